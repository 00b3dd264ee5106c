"""Classification heads in closed form: sums of features, and the heads solved from them."""
