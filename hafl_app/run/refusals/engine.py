"""What an engine cannot go with, and clients that are to train together."""

from collections.abc import Iterator

from hafl_app.config.schema import Settings
from hafl_app.run.refusals.wording import method_name


def refusals(settings: Settings) -> Iterator[str]:
    """Yield a line for each combination that is refused."""
    yield from _engine(settings)
    yield from _cohort(settings)


def _engine(settings: Settings) -> Iterator[str]:
    if settings.engine == "inprocess" and settings.federation.ray_address:
        yield "federation.ray_address: engine=inprocess uses no Ray; drop either"


def _cohort(settings: Settings) -> Iterator[str]:
    """Clients that are to train together and cannot; with ``auto`` they then do not."""
    asked, client, model = settings.federation.cohort, settings.client, settings.model
    given = f"federation.cohort={asked}"
    if asked != "auto" and not (asked.isdecimal() and int(asked) >= 1):
        yield f"{given}: expected auto or a whole number from 1"
        return
    if asked in ("auto", "1"):
        return
    if settings.engine == "ray":
        yield from _cohort_on_ray(settings, given)
    if client.max_seconds:
        yield f"{given} needs client.max_seconds=0: a time limit is each client's own"
    if client.texts_at_once < client.batch_size:
        yield f"{given} needs client.micro_batch_size=null: memory is short then"
    if client.tokens_per_step:
        yield f"{given} needs client.tokens_per_step=0: such a step goes through in parts"
    masks = "the masks would be others than alone"
    if settings.lora.lora_dropout:
        yield f"{given} needs lora.lora_dropout=0: {masks}"
    if model.dropout:
        yield f"{given} needs model.dropout=false: {masks}"
    if settings.privacy.kind == "local_dp":
        yield f"{given}: under privacy=local_dp a node's noise depends on the last bit it uploads"
    if settings.strategy.traits.trains_cores:
        method = method_name(settings)
        yield f"{given}: clients of strategy={method} train cores, each in a model of its own"
    if model.quantization == "blockwise":
        yield (
            f"{given} needs another model.quantization: under blockwise every client has its own "
            "base"
        )


def _cohort_on_ray(settings: Settings, given: str) -> Iterator[str]:
    federation = settings.federation
    for name in ("client_cpus", "client_gpus"):
        if (value := getattr(federation, name)) is not None:
            yield (
                f"{given} needs federation.{name}=null, not {value:g}: one process for each GPU, "
                "or one on the CPU, trains them all"
            )
    if federation.ray_address:
        yield f"{given} needs federation.ray_address=null: it takes a Ray of the run's own"
