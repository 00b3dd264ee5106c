"""Settings arrive where they are used."""

from dataclasses import fields

from hafl_app.config.compose import compose
from hafl_app.run.build import run_options
from hafl_app.server.options import RunOptions


def test_a_strategy_has_the_settings_themselves():
    settings = compose(["seed=7", "model.head=frozen"])

    options = run_options(settings)

    assert options.federation is settings.federation
    assert options.client is settings.client
    assert options.lora is settings.lora
    assert (options.head, options.seed) == ("frozen", 7)
    assert {f.name for f in fields(RunOptions)} == {
        *("federation", "client", "lora", "privacy", "seed"),
        *("head", "head_refresh_every", "closed_form"),
    }


def test_the_privacy_of_a_federation_is_that_of_its_settings():
    privacy = run_options(compose(["privacy.kind=local_dp", "privacy.delta=1e-6"])).privacy

    assert (privacy.kind, privacy.delta) == ("local_dp", 1e-6)
    assert privacy.noise_key
