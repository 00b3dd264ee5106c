"""What is installed: `hafl` and its settings, away from the repository; and its bundle."""

import os
import shutil
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk
from programs import ROOT
from running import TINY

from hafl_app.engines import app_folder
from hafl_app.engines.processes import tool


def call(*command, cwd, **environment):
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return a folder with what the wheel installs."""
    folder = tmp_path_factory.mktemp("wheel")
    uv = tool("uv")
    python = (sys.executable, "-c", "")
    if call(uv, "run", "--no-project", "--with", "hatchling", *python, cwd=folder).returncode:
        pytest.skip("hatchling is neither installed nor to be had from a package index")
    built = call(uv, "build", "--wheel", "--out-dir", folder, ROOT, cwd=folder)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.mark.wheel
def test_the_wheel_has_every_file_of_the_app_and_of_conf(site):
    shipped = {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")}
    conf = site / "hafl_app" / "conf"
    assert {path.relative_to(conf) for path in conf.rglob("*.yaml")} == shipped
    names = {str(p.relative_to(site)) for p in site.rglob("*.py")}
    assert names == {str(p.relative_to(ROOT)) for p in (ROOT / "hafl_app").rglob("*.py")}
    page = {str(p.relative_to(site)) for p in (site / "hafl_app" / "dashboard").glob("*/*.*")}
    wanted = {str(p.relative_to(ROOT)) for p in (ROOT / "hafl_app" / "dashboard").glob("*/*.*")}
    assert {name for name in wanted if not name.endswith(".pyc")} <= page
    assert "hafl = hafl_app.commands.main:main" in "".join(
        file.read_text() for file in site.glob("*.dist-info/entry_points.txt")
    )


@pytest.mark.wheel
def test_it_runs_from_another_folder(site, tmp_path):
    code = "import sys; from hafl_app.commands.main import main; sys.exit(main())"
    done = call(
        *(sys.executable, "-c", code, "simulate", "experiment=demo", *TINY, "engine=inprocess"),
        *("federation.num_rounds=1", "output_dir=here"),
        cwd=tmp_path,
        PYTHONPATH=str(site),
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "here" / "adapter").is_dir()


def bundled(app: Path) -> set[str]:
    names = zipfile.ZipFile(BytesIO(build_fab_from_disk(app))).namelist()
    return {name for name in names if not name.startswith((".info", "README", "LICENSE"))}


def test_the_bundle_of_an_installed_app_is_that_of_the_repository(tmp_path, monkeypatch):
    package = tmp_path / "site" / "hafl_app"
    shutil.copytree(ROOT / "hafl_app", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "conf", package / "conf")
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, package)
    monkeypatch.setattr(app_folder, "PACKAGE", package)
    monkeypatch.setattr(app_folder, "CONF", package / "conf")

    with app_folder.app_folder() as app:
        assert app != ROOT
        assert bundled(app) == bundled(ROOT)
    assert not app.exists()


def test_the_bundle_of_the_repository_is_built_in_place():
    with app_folder.app_folder() as app:
        assert app == ROOT
    assert (ROOT / "pyproject.toml").is_file()
