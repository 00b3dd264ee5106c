"""`python -m hafl_app.commands`: the `hafl` command where it is not installed."""

import sys

from hafl_app.commands.main import main

sys.exit(main())
