"""`python -m hafl_app.deployment`: what `scripts/deploy_local.sh` runs."""

import sys

from hafl_app.deployment.deploy_local import main

sys.exit(main())
