"""What the settings say arrives where it is used."""

from dataclasses import asdict, fields

from hafl_app.config.compose import compose
from hafl_app.run.build import federation_options
from hafl_app.server.options import FederationOptions

# One value of every option, none of them the default.
SETTINGS = {
    "seed": ("seed", 5),
    "fraction_train": ("federation.fraction_train", 0.3),
    "fraction_evaluate": ("federation.fraction_evaluate", 0.4),
    "evaluate_every": ("federation.evaluate_every", 3),
    "num_rounds": ("federation.num_rounds", 7),
    "local_epochs": ("client.local_epochs", 4),
    "max_steps": ("client.max_steps", 11),
    "head": ("model.head", "frozen"),
    "lora_alpha": ("lora.lora_alpha", 24.0),
    "scaling": ("lora.scaling", "rslora"),
    "timeout_s": ("federation.round_timeout_s", 12.5),
    "min_replies": ("federation.min_replies", 2),
    "max_retries": ("federation.max_retries", 6),
    "max_norm_ratio": ("federation.max_norm_ratio", 8.0),
    "clip_ratio": ("federation.clip_ratio", 1.5),
    "robust": ("federation.robust", "trimmed_mean"),
    "trim_fraction": ("federation.trim_fraction", 0.1),
    "quarantine_after": ("federation.quarantine.after", 9),
    "quarantine_rounds": ("federation.quarantine.rounds", 13),
    "streaming": ("federation.streaming", True),
    "stream_buffer": ("federation.stream_buffer", 4),
    "upload": ("federation.upload", "int8"),
    "error_feedback": ("federation.error_feedback", False),
}


def test_every_option_of_a_federation_is_the_setting_of_its_name():
    options = federation_options(compose([f"{s}={value}" for s, value in SETTINGS.values()]))

    expected = {name: value for name, (_, value) in SETTINGS.items()}
    assert {name: value for name, value in asdict(options).items() if name != "privacy"} == expected
    assert {f.name for f in fields(FederationOptions)} == {*expected, "privacy"}
    assert all(value != getattr(FederationOptions(), name) for name, value in expected.items())


def test_the_privacy_of_a_federation_is_that_of_its_settings():
    privacy = federation_options(compose(["privacy.kind=local_dp", "privacy.delta=1e-6"])).privacy

    assert (privacy.kind, privacy.delta) == ("local_dp", 1e-6)
    assert privacy.noise_key
