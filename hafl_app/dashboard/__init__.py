"""`hafl dashboard`: a local page of runs and, of a deployment, its nodes. It only reads."""
