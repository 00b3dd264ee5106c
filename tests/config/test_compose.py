from copy import deepcopy
from dataclasses import FrozenInstanceError, fields

import pytest
from omegaconf import OmegaConf

from hafl_app.config.compose import SettingsError, _merge, compose, merge_files, quoted
from hafl_app.config.files import CONF
from hafl_app.run import build
from hafl_app.run.plain_settings import plain_settings
from hafl_app.strategies.base import HeterogeneousLora

FILES = sorted(path.relative_to(CONF) for path in CONF.glob("*/*.yaml"))
INSTRUCTIONS = ["dataset=instructions", "dataset.path=mine.jsonl"]
# What a file leaves open on purpose, or goes together with, given here.
REQUIRED = {
    "model/encoder": ["model.path=some/encoder"],
    "partition/natural": ["partition.column=label"],
    "dataset/local": ["dataset.path=train.csv"],
    "dataset/digits": ["model=vit_digits_random"],
    "model/vit_digits_random": ["dataset=digits"],
    "dataset/dolly": ["dataset.path=dolly", "model=tiny_random_causal"],
    "dataset/gsm8k": ["dataset.path=gsm8k", "model=tiny_random_causal"],
    "dataset/instructions": ["dataset.path=mine.jsonl", "model=tiny_random_causal"],
    "dataset/natural_instructions": ["dataset.path=tasks", "model=tiny_random_causal"],
    "model/causal": ["model.path=some/model", *INSTRUCTIONS],
    "model/stories260k": ["model.path=stories260k", *INSTRUCTIONS],
    "model/llama_1b_random": INSTRUCTIONS,
    "model/llama_7b_random": INSTRUCTIONS,
    "model/tiny_random_causal": INSTRUCTIONS,
    **{
        f"model/{name}": INSTRUCTIONS
        for name in (
            *("smollm2", "smollm2_360m", "smollm2_1_7b", "gemma3_270m", "llama3_2_1b", "phi4_mini"),
            *("qwen2_5_0_5b", "qwen2_5_1_5b", "qwen2_5_1_5b_random", "qwen2_5_7b"),
        )
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_file_composes(file):
    group, name = file.parts[0], file.stem
    overrides = [f"{group}={name}", *REQUIRED.get(f"{group}/{name}", [])]
    settings = compose(overrides)
    assert isinstance(build.strategy(settings), HeterogeneousLora)
    # What is written down composes to the same again.
    OmegaConf.to_yaml(OmegaConf.create(plain_settings(settings)))


@pytest.mark.parametrize(
    "overrides",
    [
        ["seed=3", "experiment=digits", "client.learning_rate=0.5", "strategy=hetlora"],
        ["ranks.tiers=[{rank: 2, share: 1}]", "client.max_steps=2", "strategy=hetlora"],
        ["strategy=rbla", "++client.max_steps=3", "lora.target_modules=[query]"],
        ["tracking=none", "dataset.path=null", "lora.max_rank=2", "lora.max_rank=3"],
    ],
)
def test_values_on_kept_files_are_what_hydra_makes_of_both(overrides):
    """Files are merged once and kept; a value of one composition is in no other."""
    fast, hydras = merge_files(overrides), _merge(overrides)
    assert OmegaConf.to_yaml(fast) == OmegaConf.to_yaml(hydras)
    assert OmegaConf.is_struct(fast) == OmegaConf.is_struct(hydras)
    fast.seed = 77
    assert OmegaConf.to_yaml(merge_files(overrides)) == OmegaConf.to_yaml(hydras)


def test_the_default_is_the_main_job():
    settings = compose([])
    assert type(settings.strategy).__name__ == "Hafl"
    assert settings.model.name == "minilm"
    assert settings.engine == "ray"


def test_everyday_settings_take_effect():
    settings = compose(
        [
            "strategy=zero_padding",
            "federation.num_clients=7",
            "federation.num_rounds=3",
            "federation.fraction_train=0.5",
            "client.local_epochs=2",
            "client.learning_rate=0.01",
            "lora.max_rank=16",
            "lora.target_modules=[query,value]",
            "seed=5",
        ]
    )
    assert settings.strategy.max_rank == 16
    assert list(settings.lora.target_modules) == ["query", "value"]
    assert (settings.federation.num_rounds, settings.federation.fraction_train) == (3, 0.5)
    assert (settings.client.local_epochs, settings.client.learning_rate) == (2, 0.01)
    assert settings.seed == 5


@pytest.mark.parametrize(
    "text", ["two words", "it's", "a\\b", "a\\'b", "end\\", "a,b=[c]{d}", 'say "x"', "null", "7"]
)
def test_a_quoted_text_arrives_as_it_is(text):
    assert compose([f"output_dir={quoted(text)}"]).output_dir == text


class TestRefusals:
    @pytest.mark.parametrize(
        ("override", "words"),
        [
            ("strategy=haffl", ["strategy=haffl", "zero_padding", "did you mean hafl?"]),
            (
                "federation.num_round=3",
                ["federation.num_round", "did you mean federation.num_rounds?"],
            ),
            ("num_rounds=3", ["num_rounds", "did you mean federation.num_rounds?"]),
            ("federation.num_rounds=many", ["federation.num_rounds", "many", "Integer"]),
            ("federation.num_rounds=-1", ["federation.num_rounds=-1", "at least 0"]),
            ("client.proximal=inf", ["client.proximal=inf", "a finite number"]),
            ("strategy.smoothing=nan", ["strategy.smoothing=nan", "at least 0"]),
            ("federation.fraction_train=1.5", ["federation.fraction_train=1.5", "at most 1"]),
            ("client.optimizer=adam", ["client.optimizer=adam", "adamw or sgd", "mean adamw?"]),
            ("strategy.smoothing=high", ["strategy.smoothing", "high", "Float"]),
            ("strategy.smoothing=1", ["strategy.smoothing=1", "below 1"]),
            ("strategy.scheme=freeze", ["strategy.scheme=freeze", "did you mean freezing?"]),
            ("strategy.schema=freezing", ["strategy.schema", "did you mean strategy.scheme?"]),
            ("engine=inproces", ["engine=inproces", "did you mean inprocess?"]),
            ("+model.nam=x", ["model.nam", "no such setting", "did you mean model.name?"]),
            ("+federation.num_round=1", ["no such setting", "did you mean federation.num_rounds?"]),
            ("+sed=1", ["sed: no such setting", "did you mean seed?"]),
            ("seed=", ["seed"]),
            ("=3", ["=3"]),
        ],
    )
    def test_one_line_names_value_expectation_and_nearest_name(self, override, words):
        with pytest.raises(SettingsError) as error:
            compose([override])
        message = str(error.value)
        assert "\n" not in message
        assert all(word in message for word in words), message


class TestRunConfig:
    def test_empty_knobs_mean_as_in_conf(self):
        empty = dict.fromkeys(["overrides", *build.KNOBS], "")
        assert plain_settings(build.settings_of_run(empty)) == plain_settings(compose([]))

    def test_knobs_win_over_overrides(self):
        settings = build.settings_of_run(
            {
                "overrides": "seed=1 strategy=fedit",
                "strategy": "zero_padding",
                "rounds": 4,
                "seed": 0,
            }
        )
        assert type(settings.strategy).__name__ == "ZeroPadding"
        assert (settings.federation.num_rounds, settings.seed) == (4, 0)

    def test_every_knob_is_in_the_apps_run_config(self):
        import tomllib

        project = tomllib.loads((CONF.parent / "pyproject.toml").read_text())
        config = project["tool"]["flwr"]["app"]["config"]
        assert set(config) == {"overrides", *build.KNOBS}
        assert set(config.values()) == {""}


def test_hyper_parameters_have_a_type_and_a_place_in_their_file():
    for path in (CONF / "strategy").glob("*.yaml"):
        file = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        written = set(file.get("strategy", file)) - {"_target_"}  # some set more than the strategy
        method = type(compose([f"strategy={path.stem}"]).strategy)
        assert written <= {f.name for f in fields(method) if f.init}


class TestWhatIsHandedOut:
    OVERRIDES = ("strategy=haflq", "dataset.label_names=[a,b]", "lora.target_modules=[query]")

    def test_no_other_settings_change(self):
        settings = compose(self.OVERRIDES)
        before = deepcopy(plain_settings(settings))

        settings.federation.num_rounds = 99
        settings.federation.quarantine.after = 99
        settings.seed = 99
        settings.strategy.exploration = 0.99
        settings.strategy.distances_m.append(99.0)
        settings.dataset.label_names.append("c")
        settings.lora.target_modules.append("value")
        settings.ranks.tiers[0].rank = 99
        settings.ranks.tiers.pop()
        settings.compare.methods["new"] = None

        again = compose(self.OVERRIDES)
        assert plain_settings(again) == before == plain_settings(compose([*self.OVERRIDES]))
        assert again.compare.methods == {}

    def test_what_is_a_key_cannot_be_changed(self):
        settings = compose(self.OVERRIDES)
        for group in ("model", "dataset", "partition", "client", "privacy"):
            value = getattr(settings, group)
            with pytest.raises(FrozenInstanceError):
                setattr(value, fields(value)[0].name, "other")
            assert hash(value) == hash(getattr(compose(self.OVERRIDES), group))

    def test_groups_that_are_frozen_take_files_and_overrides(self):
        partition = ["partition=dirichlet", "partition.min_examples=7"]
        model = ["model=llama_1b_random", "model.shape.hidden_size=96", "client=sgd"]
        settings = compose([*partition, *model])
        assert (settings.partition.kind, settings.partition.min_examples) == ("dirichlet", 7)
        assert settings.model.shape["hidden_size"] == 96
        assert settings.client.optimizer == "sgd"
