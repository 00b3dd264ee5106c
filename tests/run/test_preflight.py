"""Settings that cannot work are refused before a client is asked for anything."""

import importlib.util
import shlex

import pytest
from running import TINY

from hafl_app.client_app import app as client_app
from hafl_app.config.compose import SettingsError, compose
from hafl_app.engines.in_process import InProcessGrid
from hafl_app.run.build import settings_of_run
from hafl_app.run.federation import run
from hafl_app.run.preflight import check
from hafl_app.run.requirements import check_packages
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


class TestMissingPackages:
    @pytest.fixture(autouse=True)
    def nothing_installed(self, monkeypatch):
        find = importlib.util.find_spec
        gone = {"bitsandbytes", "rouge_score", "wandb", "tensorboard", "mlflow", "trackio"}
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *a: None if name in gone else find(name, *a)
        )

    NEEDS = (
        ("model.quantization=nf4", "pip install .*bitsandbytes"),
        ("model.quantization=int8", "pip install .*bitsandbytes"),
        ("federation.generate_examples=2", "pip install .*rouge-score"),
        ("tracking=wandb", "pip install .*wandb"),
        ("tracking=tensorboard", "pip install .*tensorboard"),
        ("tracking=mlflow", "pip install .*mlflow-skinny"),
        ("tracking=[jsonl,trackio]", "pip install .*trackio"),
    )

    def settings(self, override, *more):
        model = ["model=tiny_random_causal", "dataset=dolly", "dataset.path=none"]
        return compose([*TINY, *(model if "generate" in override else []), override, *more])

    @pytest.mark.parametrize(("override", "words"), NEEDS)
    def test_one_is_named_with_the_command_before_anything_is_written(
        self, override, words, tmp_path
    ):
        settings = self.settings(override, f"output_dir={tmp_path / 'out'}")
        with pytest.raises(ValueError, match=words) as caught:
            check(settings)
        assert "\n" not in str(caught.value)
        with pytest.raises(ValueError, match=words):
            run(UnusedGrid(client_app, 5, {}), settings)
        assert not list(tmp_path.iterdir())

    def test_only_what_the_nodes_need_does_not_stop_a_server(self):
        blocks = ("model.quantization=blockwise", "model.memory_budget_mb=9")
        settings = self.settings(*blocks)
        check_packages(settings, nodes_too=False)
        with pytest.raises(ValueError, match="bitsandbytes"):
            check_packages(settings, nodes_too=True)


def test_blocks_of_mixed_bits_need_a_budget_in_a_simulation():
    settings = compose([*TINY, "model.quantization=blockwise"])
    with pytest.raises(SettingsError, match=r"needs a budget: model\.memory_budget_mb="):
        check(settings)
    settings_of_run({"overrides": "model.quantization=blockwise"})  # nodes may have their own
