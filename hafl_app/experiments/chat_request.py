"""Check what `hafl chat` is asked for, by the adapter's card alone: no model is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hafl_app.data.errors import nearest
from hafl_app.metrics import CAUSAL_LM
from hafl_app.renames import FACTS
from hafl_app.training.adapter_card import SavedAdapterError, adapter_folder, read_card

BASE: Final = "base"
WHOLE: Final = "adapter"


@dataclass(frozen=True)
class ChatRequest:
    """Request to answer prompts with an adapter of a causal language model.

    Parameters
    ----------
    folder
        Of the saved adapter.
    speakers
        Who answers each prompt, in this order: `BASE`, `WHOLE`, or a rank that the adapter is cut
        to.
    max_new_tokens
        Of an answer, at least 1.
    temperature
        0, the most probable tokens, or from 0.01 to 10.
    seed
        Of drawn answers; None is 0.
    trust_remote_code
        Let the base model's repository run its own Python code.

    Raises
    ------
    ValueError
        If the temperature is out of its range, or there is a seed and nothing is drawn.
    """

    folder: Path
    speakers: tuple[str | int, ...] = (WHOLE,)
    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or 0.01 <= self.temperature <= 10):
            raise ValueError(f"--temperature {self.temperature}: expected 0, or 0.01 to 10")
        if self.seed is not None and self.temperature == 0:
            raise ValueError(f"--seed {self.seed}: of drawn answers, add --temperature")


def read_request(source: Path, compare: str | None, **how: Any) -> ChatRequest:
    """Return the request for a folder, if its adapter can answer it.

    Parameters
    ----------
    source
        Folder of a run, or of an adapter.
    compare
        Speakers, with commas between; None is the whole adapter alone.
    how
        Other fields of the request.

    Raises
    ------
    ValueError
        In one line, if that is no adapter of a causal language model, or has no such speaker.
    """
    folder = adapter_folder(source.expanduser())
    task, rank = _task_and_rank(folder, read_card(folder))
    if task != CAUSAL_LM.name:
        raise ValueError(
            f"{folder}: the adapter's task is {task}; expected {CAUSAL_LM.name}, a model that "
            "writes (hafl evaluate scores the others)"
        )
    if compare is None:
        return ChatRequest(folder, **how)
    return ChatRequest(folder, tuple(_speakers(compare, rank)), **how)


def _task_and_rank(folder: Path, card: Any) -> tuple[str, int | None]:
    """Return the model's task, and the adapter's largest rank; None where an old card has none."""
    try:
        base: Mapping[str, Any] = {FACTS.get(k, k): value for k, value in card["base"].items()}
        task, ranks = str(base.get("task", "classification")), card.get("ranks", {})
        return task, max(map(int, ranks.values()), default=None)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise SavedAdapterError(f"{folder}: not a saved adapter: {error!r}") from error


def _speakers(compare: str, rank: int | None) -> list[str | int]:
    found: list[str | int] = []
    for word in compare.split(","):
        name = word.strip()
        is_number = name.isascii() and name.isdigit()
        if is_number and (int(name) < 1 or (rank is not None and int(name) > rank)):
            raise ValueError(f"--compare {compare}: rank {name}: expected 1 to {rank}")
        if not is_number and name not in (BASE, WHOLE):
            ranks = f"or a rank from 1 to {rank}" if rank else "or a rank"
            raise ValueError(
                f"--compare {compare}: {name!r}: expected {BASE}, {WHOLE} {ranks}"
                f"{nearest(name, (BASE, WHOLE))}"
            )
        speaker = int(name) if is_number else name
        if speaker in found:
            raise ValueError(f"--compare {compare}: {name} is there twice")
        found.append(speaker)
    return found
