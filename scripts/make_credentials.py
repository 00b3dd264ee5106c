"""Make a deployment's credentials: `python scripts/make_credentials.py FOLDER --node NAME ...`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hafl_app.deployment.credentials_command import main

if __name__ == "__main__":
    sys.exit(main())
