"""What privacy and secure sums cannot go with."""

from collections.abc import Iterator, Mapping
from typing import Final

from hafl_app.config.schema import Settings
from hafl_app.run.refusals.wording import method_name, value_of, word

_CROSS_CLIENT = "one client's upload would change how the others count"
_ONE_RELEASE = "a repeated round is one more release than epsilon counts"
PRIVACY_NEEDS: Final[Mapping[str, Mapping[str, tuple[object, str]]]] = {
    "none": {},
    "central_dp": {
        "robust": ("none", _CROSS_CLIENT),
        "clip_ratio": (None, f"{_CROSS_CLIENT}; privacy.clip_norm clips"),
        "max_norm_ratio": (None, _CROSS_CLIENT),
        "min_replies": (1, "whether a round counts would tell how many took part"),
        "max_retries": (0, _ONE_RELEASE),
    },
    "local_dp": {
        "fraction_evaluate": (0.0, "scores on private data would be uploaded without noise"),
        "alone_clients_per_rank": (0, "training alone is one more upload than epsilon counts"),
        "max_retries": (0, _ONE_RELEASE),
    },
}
"""Settings of `federation` that the reported privacy needs, and the reasons."""

_SINGLE = "it needs single updates, and the server has their sums alone"
SECURE_NEEDS: Final[Mapping[str, tuple[object, str]]] = {
    "privacy.kind": ("none", "clipping needs single updates, and noise is counted without sums"),
    "federation.robust": ("none", _SINGLE),
    "federation.max_norm_ratio": (None, _SINGLE),
    "federation.clip_ratio": (None, _SINGLE),
    "federation.scaffold": (False, _SINGLE),
    "federation.streaming": (False, "a sum is opened when all have answered"),
    "federation.upload": ("fp32", "masked numbers cannot be rounded further"),
    "federation.alone_clients_per_rank": (0, "who trains alone would upload without a mask"),
}
"""What `privacy.secure_aggregation` needs, and the reasons."""


def refusals(settings: Settings) -> Iterator[str]:
    """Yield a line for each combination that is refused."""
    yield from _secure(settings)
    yield from _privacy(settings)


def _secure(settings: Settings) -> Iterator[str]:
    for name, (expected, reason) in SECURE_NEEDS.items():
        value = value_of(settings, name)
        if settings.privacy.secure_aggregation and value != expected:
            yield (
                f"privacy.secure_aggregation=true needs {name}={word(expected)}, not "
                f"{word(value)}: {reason}"
            )
    traits = settings.strategy.traits
    if settings.privacy.secure_aggregation and not traits.sums_updates:
        from hafl_app.server.compatibility import secure_refusal  # noqa: PLC0415  imports torch

        yield secure_refusal(method_name(settings), traits.sum_refusal)


def _privacy(settings: Settings) -> Iterator[str]:
    kind = settings.privacy.kind
    for name, (expected, reason) in PRIVACY_NEEDS[kind].items():
        if (value := getattr(settings.federation, name)) != expected:
            yield (
                f"federation.{name}={word(value)}: privacy={kind} needs {word(expected)}, "
                f"because {reason}"
            )
