"""Settings that cannot work are refused before a client is asked for anything."""

import json

import pytest
from running import TINY, run_tiny

from hafl_app.config.compose import compose
from hafl_app.engines.in_process import InProcessGrid
from hafl_app.privacy.mechanism import PrivacyError
from hafl_app.run.preflight import check
from hafl_app.server.method import StrategyError

KIND_ALONE = ("strategy=zero_padding", "privacy.kind=central_dp")  # not conf/privacy/central_dp


class UnusedGrid(InProcessGrid):
    """Nobody may be asked."""

    def push_messages(self, messages):
        raise AssertionError(f"{len(list(messages))} messages sent")


class TestPrivacyThatWouldNotHold:
    REFUSED = r"federation\.max_norm_ratio=10.0: privacy=central_dp needs null, because"

    def test_is_refused_by_the_check(self):
        with pytest.raises(PrivacyError, match=self.REFUSED):
            check(compose([*TINY, *KIND_ALONE]))

    def test_is_refused_by_a_run_that_was_not_checked(self, tmp_path):
        with pytest.raises(PrivacyError, match=self.REFUSED):
            run_tiny(tmp_path / "out", *KIND_ALONE, grid_type=UnusedGrid)

        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert summary["status"] == "failed"
        assert "max_norm_ratio=10.0" in summary["reason"]


@pytest.mark.parametrize("method", ["zero_padding", "hetlora", "flexlora"])
def test_a_robust_rule_without_meaning_for_the_method_is_refused(method):
    overrides = [*TINY, f"strategy={method}"]
    check(compose(overrides))

    with pytest.raises(StrategyError, match=r"federation\.robust=median is refused"):
        check(compose([*overrides, "federation.robust=median"]))
