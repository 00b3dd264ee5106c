"""Talk to a saved adapter in the terminal: `hafl chat`; `--help` explains it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hafl_app.commands.main import main as hafl


def main() -> int:
    """Run the command, and return its exit code."""
    return hafl(["chat", *sys.argv[1:]], ("python", sys.argv[0]))


if __name__ == "__main__":
    sys.exit(main())
