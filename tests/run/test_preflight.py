"""Settings that cannot work are refused before a client is asked for anything."""

import shlex

import pytest
from running import TINY

from hafl_app.client_app import app as client_app
from hafl_app.config.compose import SettingsError, compose
from hafl_app.engines.in_process import InProcessGrid
from hafl_app.run.build import settings_of_run
from hafl_app.run.federation import run
from hafl_app.run.preflight import check
from hafl_app.server.method import StrategyError

KIND_ALONE = ("strategy=zero_padding", "privacy.kind=central_dp")  # not conf/privacy/central_dp


class UnusedGrid(InProcessGrid):
    """A grid on which no node may be asked."""

    def push_messages(self, messages):
        raise AssertionError(f"{len(list(messages))} messages sent")


class TestPrivacyThatWouldNotHold:
    REFUSED = r"federation\.max_norm_ratio=10.0: privacy=central_dp needs null, because"

    def test_is_refused_by_the_check(self):
        with pytest.raises(SettingsError, match=self.REFUSED):
            check(compose([*TINY, *KIND_ALONE]))

    def test_is_refused_by_a_run_that_was_not_checked(self, tmp_path):
        settings = compose([*TINY, *KIND_ALONE, f"output_dir={tmp_path / 'out'}"])

        with pytest.raises(SettingsError, match=self.REFUSED):
            run(UnusedGrid(client_app, 5, {}), settings)

        assert not (tmp_path / "out").exists()

    def test_is_refused_by_a_node(self):
        with pytest.raises(SettingsError, match=self.REFUSED):
            settings_of_run({"overrides": shlex.join(KIND_ALONE)})


@pytest.mark.parametrize("method", ["zero_padding", "hetlora", "flexlora"])
def test_a_robust_rule_without_meaning_for_the_method_is_refused(method):
    overrides = [*TINY, f"strategy={method}"]
    check(compose(overrides))

    with pytest.raises(StrategyError, match=r"federation\.robust=median is refused"):
        check(compose([*overrides, "federation.robust=median"]))
