"""What base model and data cannot go with, of each other."""

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

from omegaconf import OmegaConf

from hafl_app.config.files import files_of
from hafl_app.config.habits import MODEL
from hafl_app.config.schema import Settings
from hafl_app.data.combinations import IMAGES, ON_DEVICE, check_choices, check_sharing
from hafl_app.data.errors import DataError, nearest
from hafl_app.metrics import CAUSAL_LM, IMAGE_CLASSIFICATION
from hafl_app.run.refusals.wording import method_name
from hafl_app.training.chat_templates import CHAT_TEMPLATES

_PINS: Final = ("revision", "sha256", "package_path", "package_sha256")
"""Settings of `model` that belong to one repository."""


def refusals(settings: Settings) -> Iterator[str]:
    """Yield a line for each combination that is refused."""
    yield from _pinned_base(settings)
    yield from _images(settings)
    yield from _ranks(settings)
    yield from _answers(settings)
    yield from _chat_template(settings)
    yield from _data(settings)


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


def _images(settings: Settings) -> Iterator[str]:
    """Images for a model of text, text for one of images, and what images do not have."""
    images, task = settings.dataset.source in IMAGES, settings.model.task
    if images != (task == IMAGE_CLASSIFICATION.name):
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


def _ranks(settings: Settings) -> Iterator[str]:
    if settings.ranks.source == "memory" and settings.strategy.traits.trains_global_rank:
        yield (
            f"ranks=from_memory: strategy={method_name(settings)} trains lora.max_rank on every "
            "client, whatever its rank; take ranks with tiers"
        )


def _answers(settings: Settings) -> Iterator[str]:
    """Answers without a model that learns them, and the other way round."""
    dataset, causal = settings.dataset, settings.model.task == CAUSAL_LM.name
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


def _data(settings: Settings) -> Iterator[str]:
    try:
        check_choices(settings.dataset)
        check_sharing(settings.dataset, settings.partition.kind)
    except DataError as error:
        yield str(error)
