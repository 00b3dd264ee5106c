"""Write docs/settings.md from the schema of conf/: python scripts/settings_doc.py [--check]."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hafl_app.config.reference import settings_reference  # noqa: E402

_FILE = ROOT / "docs" / "settings.md"
_STALE = 1


def main() -> int:
    """Write the page, or with ``--check`` say whether it is stale."""
    page = settings_reference()
    if "--check" not in sys.argv[1:]:
        _FILE.write_text(page, encoding="utf-8")
    elif not _FILE.is_file() or _FILE.read_text(encoding="utf-8") != page:
        print(f"{_FILE.relative_to(ROOT)} is stale: run python scripts/settings_doc.py")
        return _STALE
    return 0


if __name__ == "__main__":
    sys.exit(main())
