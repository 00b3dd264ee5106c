"""The app bundle that travels to every node: what is in it, and how large it is."""

import tomllib
import zipfile
from io import BytesIO
from pathlib import Path

import grimp
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
    files = left_out_files()
    used = [p for p in app.rglob("*.py") if p.parent.name not in left_out and p not in files]
    expected = {str(p.relative_to(ROOT)) for p in used}
    expected |= {str(p.relative_to(ROOT)) for p in (ROOT / "conf").rglob("*.yaml")}
    assert expected <= names
    rest = {name for name in names - expected if not name.startswith(".info")}
    assert rest <= {"pyproject.toml", "README.md", "LICENSE"}
    assert len(bundle) < 2_000_000  # bytes, of the 10 MB that Flower takes


def test_what_is_left_out_is_imported_by_no_server_and_no_client():
    graph = grimp.build_graph("hafl_app")
    apps = {"hafl_app.server_app", "hafl_app.client_app"}
    used = apps.union(*(graph.find_upstream_modules(app) for app in apps))
    left_out = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in left_out_files()}

    assert left_out
    assert not used & left_out


def left_out_files() -> set[Path]:
    """Return the files that the bundle leaves out by their own names."""
    app = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    return {ROOT / name for name in app["fab-exclude"] if name.endswith(".py")}
