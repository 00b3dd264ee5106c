"""Real processes on loopback, started once per module and stopped whatever happens."""

import pytest
from deployment_factories import NAMES, start_nginx

from hafl_app.deployment.credentials import make_credentials
from hafl_app.deployment.local import local_deployment


@pytest.fixture(scope="session")
def credentials(tmp_path_factory):
    return make_credentials(tmp_path_factory.mktemp("ours") / "set", [], NAMES, days=1)


@pytest.fixture(scope="session")
def foreign_credentials(tmp_path_factory):
    """Of somebody else: another CA, other keys under the same names."""
    return make_credentials(tmp_path_factory.mktemp("theirs") / "set", [], NAMES, days=1)


@pytest.fixture(scope="module")
def fence():
    """Proxy before the SuperLink; a module may set another."""
    return "built-in"


@pytest.fixture(scope="module")
def deployment(credentials, fence, tmp_path_factory):
    """SuperLink and fence, with the keys of three nodes registered and none of them started."""
    with local_deployment(credentials, tmp_path_factory.mktemp("logs")) as started:
        started.start_superlink()
        if fence == "nginx":
            start_nginx(started)
        else:
            started.start_fence()
        for name in NAMES:
            started.register(name)
        yield started
