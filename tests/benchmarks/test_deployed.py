"""The app that times a deployment: Flower finds its ServerApp in the bundle."""

import zipfile
from io import BytesIO

from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import load_and_validate

from scripts.bench_deploy import _timing_app


def test_the_timing_server_app_travels_with_its_package(tmp_path):
    app = _timing_app(tmp_path / "app")

    config, _ = load_and_validate(app / "pyproject.toml")
    names = set(zipfile.ZipFile(BytesIO(build_fab_from_disk(app))).namelist())

    assert config["tool"]["flwr"]["app"]["components"]["serverapp"] == "benchmarks.deployed:app"
    assert {"benchmarks/deployed.py", "hafl_app/client_app.py", "conf/config.yaml"} <= names
