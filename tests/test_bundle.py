"""The app bundle that travels to every node: what is in it, and how large it is."""

import zipfile
from io import BytesIO
from pathlib import Path

from flwr.cli.build import build_fab_from_disk

ROOT = Path(__file__).parents[1]


def test_the_bundle_holds_app_and_conf_and_nothing_else():
    bundle = build_fab_from_disk(ROOT)
    names = set(zipfile.ZipFile(BytesIO(bundle)).namelist())

    app = ROOT / "hafl_app"
    left_out = {
        "commands",
        "dashboard",
        "experiments",
        "deployment",
    }  # what no server and no client of a run imports
    used = [p for p in app.rglob("*.py") if p.parent.name not in left_out]
    expected = {str(p.relative_to(ROOT)) for p in used}
    expected |= {str(p.relative_to(ROOT)) for p in (ROOT / "conf").rglob("*.yaml")}
    assert expected <= names
    rest = {name for name in names - expected if not name.startswith(".info")}
    assert rest <= {"pyproject.toml", "README.md", "LICENSE"}
    assert len(bundle) < 2_500_000  # bytes, of the 10 MB that Flower takes
