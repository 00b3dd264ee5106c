"""What a round cannot go with: uploads, server optimizers, corrections, schedules, streaming."""

from collections.abc import Iterator, Mapping
from typing import Final

from hafl_app.config.schema import Settings
from hafl_app.data.combinations import ON_DEVICE
from hafl_app.run.refusals.wording import method_name, value_of, word
from hafl_app.server.settings import ServerOptimizerSettings

STREAMING_NEEDS: Final[Mapping[str, object]] = {
    "robust": "none",
    "max_norm_ratio": None,
    "clip_ratio": None,
}
"""Settings of `federation` that compare the replies of a round, and what switches them off."""

_ADAPTIVE = ("adam", "yogi")
SERVER_OPTIMIZERS_WITH: Final[Mapping[str, tuple[str, ...]]] = {
    "learning_rate": ("momentum", *_ADAPTIVE),
    "beta1": ("momentum", *_ADAPTIVE),
    "beta2": _ADAPTIVE,
    "tau": _ADAPTIVE,
}
"""Settings of `federation.server_optimizer`, and the kinds that have them."""

_NO_GRADIENT = "else a client's change is no sum of gradients"
SCAFFOLD_NEEDS: Final[Mapping[str, tuple[object, str]]] = {
    "client.optimizer": ("sgd", _NO_GRADIENT),
    "client.max_grad_norm": (0.0, _NO_GRADIENT),
    "client.weight_decay": (0.0, _NO_GRADIENT),
    "client.proximal": (0.0, _NO_GRADIENT),
    "lora.scaling": ("constant", "the gradients of lora_B are in units of their scaling"),
    "federation.upload": ("fp32", "a control variate is computed from what is uploaded"),
    "federation.clip_ratio": (None, "a control variate is computed from what is uploaded"),
    "federation.robust": ("none", "the mean of the control variates is not robust"),
    "privacy.kind": ("none", "control variates are sums without noise"),
}
"""What `federation.scaffold` needs, and the reasons."""


def refusals(settings: Settings) -> Iterator[str]:
    """Yield a line for each combination that is refused."""
    yield from _upload(settings)
    yield from _server_optimizer(settings)
    yield from _scaffold(settings)
    yield from _schedule(settings)
    yield from _early_stopping(settings)
    yield from _streaming(settings)


def _upload(settings: Settings) -> Iterator[str]:
    if settings.federation.upload == "mixed" and not settings.strategy.traits.allocates_bits:
        yield (
            "federation.upload=mixed: only strategy=haflq gives every component its bits; expected "
            "fp32, bf16 or int8"
        )


def _server_optimizer(settings: Settings) -> Iterator[str]:
    """Server optimizers without a meaning for the method, and settings that one does not have."""
    optimizer, defaults = settings.federation.server_optimizer, ServerOptimizerSettings()
    kind = optimizer.kind
    if kind != "none":
        # Here, because it imports torch, as the method's class has by now.
        from hafl_app.server.compatibility import (  # noqa: PLC0415
            no_server_optimizer,
            server_optimizer_refusal,
        )

        if reason := no_server_optimizer(settings.strategy.traits):
            yield server_optimizer_refusal(kind, method_name(settings), reason)
    for name, kinds in SERVER_OPTIMIZERS_WITH.items():
        if kind not in kinds and (value := getattr(optimizer, name)) != getattr(defaults, name):
            yield (
                f"federation.server_optimizer.{name}={value} has no effect with "
                f"federation.server_optimizer.kind={kind}, expected {' or '.join(kinds)}"
            )


def _scaffold(settings: Settings) -> Iterator[str]:
    """Refuse what makes a client's change no sum of its gradients, or hides it."""
    if not settings.federation.scaffold:
        return
    from hafl_app.server.compatibility import (  # noqa: PLC0415  it imports torch
        no_server_optimizer,
        scaffold_refusal,
    )

    if reason := no_server_optimizer(settings.strategy.traits):
        yield scaffold_refusal(method_name(settings), reason)
    for name, (expected, reason) in SCAFFOLD_NEEDS.items():
        if (value := value_of(settings, name)) != expected:
            yield (
                f"federation.scaffold=true needs {name}={word(expected)}, not {word(value)}: "
                f"{reason}"
            )


def _schedule(settings: Settings) -> Iterator[str]:
    warmup, rounds = settings.client.schedule.warmup_rounds, settings.federation.num_rounds
    if warmup and warmup >= rounds:
        yield (
            f"client.schedule.warmup_rounds={warmup}: expected below federation.num_rounds="
            f"{rounds}, else no round has client.learning_rate"
        )


def _early_stopping(settings: Settings) -> Iterator[str]:
    """Refuse to stop by scores that there are not."""
    federation, dataset = settings.federation, settings.dataset
    if not federation.early_stopping.patience:
        return
    by_server = federation.central_evaluation and settings.model.head != "local"
    by_server = by_server and dataset.source != ON_DEVICE and dataset.validation_fraction > 0
    by_clients = settings.privacy.kind == "none" and federation.fraction_evaluate > 0
    if not (by_server or (by_clients and dataset.holdout_fraction > 0)):
        yield (
            f"federation.early_stopping.patience={federation.early_stopping.patience}: neither the "
            "server nor the clients score rounds that it could stop by; expected 0, or "
            "dataset.validation_fraction above 0 with federation.central_evaluation=true"
        )


def _streaming(settings: Settings) -> Iterator[str]:
    for name, off in STREAMING_NEEDS.items() if settings.federation.streaming else ():
        if (value := getattr(settings.federation, name)) != off:
            yield (
                f"federation.streaming=true needs federation.{name}={word(off)}, not {value}: "
                "it compares all replies of a round, and streaming drops each at once"
            )
