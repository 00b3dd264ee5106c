"""Combinations of settings that are refused, each in one line.

Here stands what two groups of settings cannot be together. What one value may be is metadata of
its field; what a method cannot serve is judged by its traits, in `hafl_app.server.compatibility`;
what the data or a node do not have is found where they are read.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

from omegaconf import OmegaConf

from hafl_app.config.compose import SettingsError
from hafl_app.config.files import files_of
from hafl_app.config.habits import MODEL
from hafl_app.config.schema import Settings
from hafl_app.data.combinations import IMAGES, ON_DEVICE, check_choices, check_sharing
from hafl_app.data.errors import DataError, nearest
from hafl_app.printable import without_credentials
from hafl_app.server.devices import DevicesSettings
from hafl_app.server.settings import ServerOptimizerSettings
from hafl_app.training.chat_templates import CHAT_TEMPLATES
from hafl_app.training.settings import CLOSED_FORM

_PINS: Final = ("revision", "sha256", "package_path", "package_sha256")
"""Settings of `model` that belong to one repository."""

CAUSAL_LM, IMAGE_CLASSIFICATION = "causal_lm", "image_classification"
MOST_WATCHED: Final = 16
"""Prompts that a run may answer after every round."""

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

STREAMING_NEEDS: Final[Mapping[str, object]] = {
    "robust": "none",
    "max_norm_ratio": None,
    "clip_ratio": None,
}
"""Settings of `federation` that compare the replies of a round, and what switches them off."""

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


def check_settings(settings: Settings) -> None:
    """Refuse settings that do not go together.

    Raises
    ------
    SettingsError
        In one line: the first combination that is refused, and what would be accepted.
    """
    for refused in (refusal for check in _CHECKS for refusal in check(settings)):
        raise SettingsError(refused)


def check_comparison(settings: Settings, searches_rates: bool) -> None:
    """Refuse settings under which methods cannot be compared.

    Parameters
    ----------
    searches_rates
        Whether learning rates are searched for.

    Raises
    ------
    SettingsError
        In one line.
    """
    if settings.model.head == "local":
        raise SettingsError("model.head=local: there is no global model to compare")
    if searches_rates and not settings.dataset.validation_fraction:
        raise SettingsError("dataset.validation_fraction=0: nothing to tune on; add tune=false")


def check_centralized(settings: Settings) -> None:
    """Refuse settings under which all data in one place cannot be trained on.

    Raises
    ------
    SettingsError
        In one line.
    """
    if settings.model.head == CLOSED_FORM:
        raise SettingsError(
            f"model.head={CLOSED_FORM}: centralized training learns its head by gradients; "
            "expected averaged or frozen. The head alone of all data, which no partition changes: "
            f"scripts/simulate.py model.head={CLOSED_FORM} federation.num_rounds=0"
        )


def check_base_alone(settings: Settings) -> None:
    """Refuse to score a base model alone that cannot be.

    Raises
    ------
    SettingsError
        In one line.
    """
    if settings.model.task != CAUSAL_LM:
        raise SettingsError(
            f"adapter=none: only a model.task={CAUSAL_LM} can be scored alone, the head of a "
            f"{settings.model.task} model is trained with its adapter"
        )
    if settings.model.quantization == "blockwise":
        raise SettingsError(
            "model.quantization=blockwise: that is each client's own choice; expected none, "
            "int8 or nf4"
        )


def _images(settings: Settings) -> Iterator[str]:
    """Images for a model of text, text for one of images, and what images do not have."""
    images, task = settings.dataset.source in IMAGES, settings.model.task
    if images != (task == IMAGE_CLASSIFICATION):
        yield (
            f"model.task={task} with dataset.source={settings.dataset.source}: "
            f"image_classification (model=vit_digits_random) needs images, "
            f"dataset={' or '.join(sorted(IMAGES))}, and images need it"
        )
    if images and settings.model.pooling != "cls":
        yield (
            f"model.pooling={settings.model.pooling}: an image classifier has a head of its own, "
            "expected cls"
        )
    if images and settings.ranks.source == "memory":
        yield (
            "ranks=from_memory: the memory of a training step is not counted for images; take "
            "ranks with tiers"
        )


def _pinned_base(settings: Settings) -> Iterator[str]:
    """Commit, checksum or package of one model of the hub beside another model."""
    model = settings.model
    for path, pins in _pinned().items():
        kept = [f"model.{n}" for n, value in pins.items() if getattr(model, n) == value]
        if kept and model.path != path and not _is_local(model.path):
            yield (
                f"model.path={model.path}: {' and '.join(kept)} are those of {path}; expected "
                f"{MODEL.format(model.path)}"
            )


@cache
def _pinned() -> Mapping[str, Mapping[str, str]]:
    """Return what the files of `conf/model` pin, by the hub name that they pin it for."""
    files: list[Any] = [OmegaConf.to_container(OmegaConf.load(f)) for f in files_of("model")]
    return {
        file["path"]: pins
        for file in files
        if (pins := {name: file[name] for name in _PINS if file.get(name)})
    }


def _is_local(path: str) -> bool:
    return Path(path).is_absolute() or path.startswith((".", "~")) or Path(path).is_dir()


def _answers(settings: Settings) -> Iterator[str]:
    """Answers without a model that learns them, and the other way round."""
    dataset, causal = settings.dataset, settings.model.task == CAUSAL_LM
    on_device = dataset.source == ON_DEVICE and not dataset.has_conversations
    if causal and on_device:
        yield (
            "model.task=causal_lm with dataset=on_device learns the nodes' conversations; expected "
            "dataset.format=chat"
        )
    elif causal and not dataset.has_answers:
        yield (
            "model.task=causal_lm needs prompts with answers: dataset=chat or dolly, or another "
            "with dataset.answer_column and dataset.template"
        )
    if dataset.has_answers and not causal:
        given = "answer_column" if dataset.answer_column else "format"
        yield (
            f"dataset.{given}={getattr(dataset, given)}: answers are learned by a model=causal, "
            f"model.task is {settings.model.task}"
        )
    if not causal and (tokens := settings.client.tokens_per_step):
        yield (
            f"client.tokens_per_step={tokens}: it counts tokens of answers, model.task is "
            f"{settings.model.task}; expected 0"
        )
    if causal and settings.model.head == "local":
        yield "model.head=local: a causal language model has no head"
    if causal and (tau := settings.client.logit_adjustment) is not None:
        yield f"client.logit_adjustment={tau:g}: a causal language model has no classes"


def _chat_template(settings: Settings) -> Iterator[str]:
    """Refuse a chat template that is neither known by name nor one itself."""
    given = settings.model.chat_template
    if given is None:
        return
    if "{" not in given and given not in CHAT_TEMPLATES:
        known = ", ".join(CHAT_TEMPLATES)
        yield (
            f"model.chat_template={given}: expected one of {known}, or a Jinja template"
            f"{nearest(given, CHAT_TEMPLATES)}"
        )


def _closed_form(settings: Settings) -> Iterator[str]:
    """Refuse what a head that is solved from sums of features cannot do, or lacks."""
    federation, dataset, model = settings.federation, settings.dataset, settings.model
    if model.head != CLOSED_FORM:
        if not federation.num_rounds:
            yield (
                "federation.num_rounds=0: nothing is trained; expected at least 1, or "
                f"model.head={CLOSED_FORM}, which is solved before round 1"
            )
        return
    given = f"model.head={CLOSED_FORM}"
    if model.task == CAUSAL_LM:
        yield f"{given}: a causal language model has no head; expected averaged"
    if settings.privacy.kind != "none":
        yield (
            f"{given}: refused under privacy={settings.privacy.kind}, since sums of features are "
            "uploaded without noise; expected averaged, frozen or local"
        )
    if settings.privacy.secure_aggregation:
        yield (
            f"{given}: refused with privacy.secure_aggregation=true, since sums of features are "
            "uploaded without masks; expected averaged, frozen or local"
        )
    if federation.robust != "none":
        yield (
            f"{given}: refused with federation.robust={federation.robust}, since sums of features "
            "are added up; expected none"
        )
    if model.closed_form.chooses_on_validation:
        yield from _no_validation(settings)
    if model.asks_for_losses and not dataset.holdout_fraction:
        yield (
            "model.closed_form.temperature_by=clients: they score rows that they hold out; "
            "expected dataset.holdout_fraction above 0"
        )
    if not federation.num_rounds and model.closed_form.per_rank:
        yield (
            "model.closed_form.per_rank=true: with federation.num_rounds=0 there is no adapter to "
            "cut, all ranks have one head; expected false"
        )
    if not federation.num_rounds and federation.alone_clients_per_rank:
        yield (
            f"federation.alone_clients_per_rank={federation.alone_clients_per_rank}: with "
            "federation.num_rounds=0 nothing is trained; expected 0"
        )


def _no_validation(settings: Settings) -> Iterator[str]:
    """Yield what keeps the server from choosing ridge or temperature on validation data."""
    closed_form = settings.model.closed_form
    other = "temperature_by=clients, or a number as model.closed_form.temperature"
    if closed_form.temperature is not None or closed_form.temperature_by != "validation":
        other = "ridge_by=gcv, or a number as model.closed_form.ridge"
    expected = f"expected model.closed_form.{other}"
    if settings.dataset.source == ON_DEVICE:
        yield f"model.head={CLOSED_FORM}: dataset=on_device has no validation data; {expected}"
    elif not settings.dataset.validation_fraction:
        yield (
            f"model.head={CLOSED_FORM}: dataset.validation_fraction=0 leaves nothing to choose on; "
            f"{expected}"
        )
    elif not settings.federation.central_evaluation:
        yield (
            f"model.head={CLOSED_FORM}: with federation.central_evaluation=false the server has no "
            f"model to choose with; {expected}"
        )


def _unseen_clients(settings: Settings) -> Iterator[str]:
    unseen, clients = settings.federation.unseen_clients, settings.federation.num_clients
    asked = f"federation.unseen_clients={unseen}"
    if unseen >= clients:
        yield f"{asked}: expected below federation.num_clients={clients}"
    if unseen and settings.model.head == "local":
        yield f"{asked}: with model.head=local they would have an untrained head"
    if unseen and not settings.dataset.holdout_fraction:
        yield (
            f"{asked}: they are scored on rows that they hold out; expected "
            "dataset.holdout_fraction above 0"
        )
    if unseen and settings.privacy.kind != "none":
        yield (
            f"{asked}: refused under privacy={settings.privacy.kind}, whose guarantee and "
            "denominators count every client"
        )


def _data(settings: Settings) -> Iterator[str]:
    try:
        check_choices(settings.dataset)
        check_sharing(settings.dataset, settings.partition.kind)
    except DataError as error:
        yield str(error)


def _generation(settings: Settings) -> Iterator[str]:
    examples = settings.federation.generate_examples
    asked = f"federation.generate_examples={examples}"
    if examples and settings.model.task != CAUSAL_LM:
        yield f"{asked}: answers are generated by a model.task={CAUSAL_LM} only"
    if examples and not settings.federation.central_evaluation:
        yield f"{asked} needs federation.central_evaluation=true"
    on_clients = settings.federation.generate_on_clients
    asked = f"federation.generate_on_clients={on_clients}"
    if on_clients and settings.model.task != CAUSAL_LM:
        yield f"{asked}: answers are generated by a model.task={CAUSAL_LM} only"
    if on_clients and not settings.federation.fraction_evaluate:
        yield (
            f"{asked}: the clients that evaluate write them; expected "
            "federation.fraction_evaluate above 0"
        )
    if on_clients and not settings.dataset.holdout_fraction:
        yield (
            f"{asked}: clients answer prompts that they hold out; expected "
            "dataset.holdout_fraction above 0"
        )
    yield from _watched(settings)


def _watched(settings: Settings) -> Iterator[str]:
    """Refuse watched prompts of a run that writes no answers, and blank ones."""
    prompts = settings.federation.watch_prompts or []
    asked = f"federation.watch_prompts ({len(prompts)} given)"
    if prompts and settings.model.task != CAUSAL_LM:
        yield f"{asked}: answers are generated by a model.task={CAUSAL_LM} only"
    if prompts and not settings.federation.central_evaluation:
        yield f"{asked} needs federation.central_evaluation=true: the server has no model"
    if len(prompts) > MOST_WATCHED:
        yield f"{asked}: expected at most {MOST_WATCHED}, they are answered after every round"
    for number, prompt in enumerate(prompts, start=1):
        if not str(prompt).strip():
            yield f"federation.watch_prompts: number {number} is blank"
        if prompts.index(prompt) != number - 1:
            yield f"federation.watch_prompts: {str(prompt)[:60]!r} is there twice"


def _upload(settings: Settings) -> Iterator[str]:
    if settings.federation.upload == "mixed" and not settings.strategy.traits.allocates_bits:
        yield (
            "federation.upload=mixed: only strategy=haflq gives every component its bits; expected "
            "fp32, bf16 or int8"
        )


def _server_optimizer(settings: Settings) -> Iterator[str]:
    """Server optimizers without a meaning for the method, and settings that one does not have."""
    optimizer, defaults = settings.federation.server_optimizer, ServerOptimizerSettings()
    kind, method = optimizer.kind, type(settings.strategy).__module__.rpartition(".")[2]
    if kind != "none":
        # Here, because it imports torch, as the method's class has by now.
        from hafl_app.server.compatibility import (  # noqa: PLC0415
            no_server_optimizer,
            server_optimizer_refusal,
        )

        if reason := no_server_optimizer(settings.strategy.traits):
            yield server_optimizer_refusal(kind, method, reason)
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
        yield scaffold_refusal(type(settings.strategy).__module__.rpartition(".")[2], reason)
    for name, (expected, reason) in SCAFFOLD_NEEDS.items():
        room, _, field = name.partition(".")
        if (value := getattr(getattr(settings, room), field)) != expected:
            yield (
                f"federation.scaffold=true needs {name}={_word(expected)}, not {_word(value)}: "
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
                f"federation.streaming=true needs federation.{name}={_word(off)}, not {value}: "
                "it compares all replies of a round, and streaming drops each at once"
            )


def _privacy(settings: Settings) -> Iterator[str]:
    kind = settings.privacy.kind
    for name, (expected, reason) in PRIVACY_NEEDS[kind].items():
        if (value := getattr(settings.federation, name)) != expected:
            yield (
                f"federation.{name}={_word(value)}: privacy={kind} needs {_word(expected)}, "
                f"because {reason}"
            )


def _tracking(settings: Settings) -> Iterator[str]:
    """Passwords in an address: settings are written into files, and logged."""
    uri = settings.tracking.uri or ""
    if uri != without_credentials(uri):
        yield (
            "tracking.uri: it names a user or a password; give them as MLFLOW_TRACKING_USERNAME "
            "and MLFLOW_TRACKING_PASSWORD in the environment"
        )


def _secure(settings: Settings) -> Iterator[str]:
    for name, (expected, reason) in SECURE_NEEDS.items():
        room, _, field = name.partition(".")
        value = getattr(getattr(settings, room), field)
        if settings.privacy.secure_aggregation and value != expected:
            yield (
                f"privacy.secure_aggregation=true needs {name}={_word(expected)}, not "
                f"{_word(value)}: {reason}"
            )
    traits = settings.strategy.traits
    if settings.privacy.secure_aggregation and not traits.sums_updates:
        from hafl_app.server.compatibility import secure_refusal  # noqa: PLC0415  imports torch

        method = type(settings.strategy).__module__.rpartition(".")[2]
        yield secure_refusal(method, traits.sum_refusal)


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
        method = type(settings.strategy).__module__.rpartition(".")[2]
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


def _devices(settings: Settings) -> Iterator[str]:
    """Refuse what needs a clock without one, clients without a device, and other time limits."""
    devices, none = settings.devices, DevicesSettings()
    if not devices.classes:
        for name in ("assign", "deadline_s", "jitter", "target"):
            if (value := getattr(devices, name)) != getattr(none, name):
                yield f"devices.{name}={value}: devices=none has no clock; expected devices=mixed"
        return
    if settings.privacy.kind != "none":
        yield (
            f"devices: refused under privacy={settings.privacy.kind}, because the clock follows "
            "from the lengths of the clients' texts, and carries no noise"
        )
    if settings.model.head == CLOSED_FORM:
        yield (
            f"model.head={CLOSED_FORM}: the clock of devices counts no sums of features; "
            "expected devices=none"
        )
    if settings.client.max_seconds:
        yield (
            f"client.max_seconds={settings.client.max_seconds:g}: seconds of this machine, not of "
            "the clock of devices; expected 0, devices.deadline_s ends the wait for stragglers"
        )
    if devices.assign == "rank" and settings.ranks.source == "tiers":
        for tier in settings.ranks.tiers:
            rank = max(tier.rank, *tier.rank_pattern.values(), 1)
            if devices.class_of_rank(rank) is None:
                yield no_class_for(rank)


def no_class_for(rank: int) -> str:
    """Return the line that refuses a rank that no class of devices affords."""
    return (
        f"devices: no class affords rank {rank}; expected one whose up_to_rank is null or at least "
        f"{rank}, or devices.assign=share"
    )


def _word(value: object) -> str:
    """Write a value as on the command line."""
    return "null" if value is None else str(value)


_CHECKS: Final[tuple[Callable[[Settings], Iterator[str]], ...]] = (
    _secure,
    _privacy,
    _pinned_base,
    _images,
    _answers,
    _chat_template,
    _data,
    _closed_form,
    _unseen_clients,
    _generation,
    _upload,
    _server_optimizer,
    _scaffold,
    _schedule,
    _early_stopping,
    _streaming,
    _tracking,
    _engine,
    _cohort,
    _devices,
)
