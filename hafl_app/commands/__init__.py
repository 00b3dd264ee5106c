"""The `hafl` command, `hafl_app.simulate` from Python, and what each of them does."""
