"""Composing runs no code, reads nothing outside `conf/` and does not look at the environment."""

import sys

import pytest

from hafl_app.config.compose import SettingsError, compose
from hafl_app.config.files import CONF


def refusal(*overrides):
    with pytest.raises(SettingsError) as caught:
        compose(overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return the file that appears when the package `elsewhere` is imported."""
    trace = tmp_path / "imported"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "__init__.py").write_text("")
    (tmp_path / "elsewhere" / "method.py").write_text(
        "from pathlib import Path\n"
        "from dataclasses import dataclass\n"
        "from hafl_app.strategies.zero_padding import ZeroPadding\n"
        f"Path({str(trace)!r}).touch()\n"
        "@dataclass(kw_only=True, eq=False)\n"
        "class Own(ZeroPadding):\n"
        "    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield trace
    for name in [name for name in sys.modules if name.partition(".")[0] == "elsewhere"]:
        del sys.modules[name]


OWN = ("strategy=zero_padding", "strategy._target_=elsewhere.method.Own")


class TestStrategyTarget:
    @pytest.mark.parametrize(
        "target", ["os.system", "antigravity.fly", "hafl_app.strategies_of_mine.A", "3", "null"]
    )
    def test_other_packages_are_refused(self, target):
        assert "expected a class of hafl_app.strategies" in refusal(f"strategy._target_={target}")

    @pytest.mark.parametrize(
        "target",
        [
            "hafl_app.strategies.base.StrategyError",  # no dataclass
            "hafl_app.strategies.hetlora.ModuleSums",  # a dataclass, but no method
            "hafl_app.strategies.base.logging",
            "hafl_app.strategies.hafl.Hafle",
        ],
    )
    def test_only_methods_are_made(self, target):
        assert "HeterogeneousLora" in refusal(f"strategy._target_={target}")

    def test_only_a_module_is_imported_not_what_it_leads_to(self):
        assert "cannot be imported" in refusal("strategy._target_=hafl_app.strategies.base.os.path")

    def test_a_missing_target(self):
        assert "strategy._target_=None" in refusal("~strategy._target_")

    def test_a_package_that_is_not_listed_is_not_even_imported(self, package):
        assert "HAFL_STRATEGY_PACKAGES" in refusal(*OWN)
        assert not package.exists()

    def test_a_package_that_the_environment_lists(self, package, monkeypatch):
        monkeypatch.setenv("HAFL_STRATEGY_PACKAGES", "other, elsewhere")

        settings = compose([*OWN, "seed=7"])

        assert type(settings.strategy).__name__ == "Own"
        assert package.exists()


class TestEnvironment:
    @pytest.mark.parametrize(
        "value",
        [
            "${oc.env:HAFL_SECRET}",
            r"$\{oc.env:HAFL_SECRET\}",
            "'${oc.env:HAFL_SECRET}'",
            "'/data/${oc.env:HAFL_SECRET}'",
            "'${oc.${strategy.scope}:HAFL_SECRET}'",
            """ "${oc.decode:'${oc.env:HAFL_SECRET}'}" """.strip(),
            "str(${oc.env:HAFL_SECRET})",
            "${ oc.env : HAFL_SECRET }",
        ],
    )
    def test_no_resolver_is_run(self, value, monkeypatch):
        monkeypatch.setenv("HAFL_SECRET", "swordfish")
        message = refusal("dataset=local", f"dataset.path={value}")
        assert "swordfish" not in message
        assert "only other settings can be named" in message

    def test_not_in_a_list_either(self, monkeypatch):
        monkeypatch.setenv("HAFL_SECRET", "swordfish")
        message = refusal("lora.target_modules=[query,'${oc.env:HAFL_SECRET}']")
        assert message.startswith("lora.target_modules=${oc.env:")

    def test_other_settings_can_be_named(self):
        settings = compose(["dataset=local", "dataset.path=/data/${model.name}", "lora.max_rank=4"])
        assert settings.dataset.path == "/data/minilm"
        assert settings.strategy.max_rank == 4


class TestFiles:
    @pytest.fixture
    def outside(self, tmp_path):
        """Return a data set's file outside `conf/`, as a choice that leads there."""
        (tmp_path / "x.yaml").write_text("source: local\npath: /etc/passwd\n")
        return "/".join([".."] * len((CONF / "dataset").parts[1:])) + str(tmp_path / "x")

    @pytest.mark.parametrize("form", ["dataset={}", "+dataset@other={}", "dataset=[synthetic,{}]"])
    def test_a_choice_is_one_of_the_files(self, form, outside):
        assert "no such dataset" in refusal(form.format(outside))

    def test_so_is_each_of_several(self, outside):
        assert "no such tracking" in refusal(f"tracking=[jsonl,{outside}]")

    @pytest.mark.parametrize(
        "override",
        ["hydra.searchpath=[file:///tmp]", "hydra/job_logging=default", "+hydra.verbose=true"],
    )
    def test_hydra_itself_is_left_alone(self, override):
        assert "Hydra's own settings" in refusal(override)


@pytest.mark.parametrize("setting", ["dataset.path", "dataset.test_path", "model.path"])
def test_an_address_is_no_path_and_its_password_is_not_repeated(setting):
    message = refusal(f"{setting}=https://user:swordfish@example.org/data.csv")
    assert message == f"{setting}: expected a local file or folder, got an address with ://"
