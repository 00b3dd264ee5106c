"""A node's budget: its rank, the length of its training, and the answers that it writes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hafl_app.client.node_config import positive_number, whole_number
from hafl_app.config.compose import SettingsError
from hafl_app.config.schema import RankTier, Settings
from hafl_app.plan import TrainPlan
from hafl_app.run import build
from hafl_app.training.device import describe_device, resolve_device, usable_memory_mb
from hafl_app.training.generate import GenerationOptions
from hafl_app.training.settings import TrainOptions
from hafl_app.training.task import DeviceMemoryError

RANK, MEMORY_MB, MAX_STEPS, MAX_SECONDS = "rank", "memory-mb", "max-steps", "max-seconds"
MAX_ANSWERS, MAX_ANSWER_TOKENS = "max-answers", "max-answer-tokens"
MAX_ANSWER_SECONDS = "max-answer-seconds"
_MOST = 10**9


@dataclass(frozen=True)
class NodeLimits:
    """Limits from a node's ``--node-config``; None where its operator set none.

    Parameters
    ----------
    rank
        Largest rank, at least 1.
    memory_mb
        Memory for training in MB of 10^6 bytes, at least 1: of the process on a CPU, of the
        tensors on a GPU.
    max_steps, max_seconds
        Length of one training, above 0.
    max_answers
        Answers that it writes to be scored, at least 0.
    max_answer_tokens, max_answer_seconds
        Length of one of them, and of all together, above 0.
    """

    rank: int | None = None
    memory_mb: int | None = None
    max_steps: int | None = None
    max_seconds: float | None = None
    max_answers: int | None = None
    max_answer_tokens: int | None = None
    max_answer_seconds: float | None = None

    @classmethod
    def of(cls, node_config: Mapping[str, Any]) -> "NodeLimits":
        """Read a node's config.

        Raises
        ------
        hafl_app.client.node_config.NodeConfigError
            Naming the key, if a value is no number or too small.
        """
        return cls(
            rank=whole_number(node_config, RANK, 1, _MOST),
            memory_mb=whole_number(node_config, MEMORY_MB, 1, _MOST),
            max_steps=whole_number(node_config, MAX_STEPS, 1, _MOST),
            max_seconds=positive_number(node_config, MAX_SECONDS),
            max_answers=whole_number(node_config, MAX_ANSWERS, 0, _MOST),
            max_answer_tokens=whole_number(node_config, MAX_ANSWER_TOKENS, 1, _MOST),
            max_answer_seconds=positive_number(node_config, MAX_ANSWER_SECONDS),
        )

    def limit_plan(self, plan: TrainPlan) -> TrainPlan:
        """Return the plan with at most this node's number of steps."""
        steps = [steps for steps in (plan.max_steps, self.max_steps) if steps]
        return replace(plan, max_steps=min(steps, default=0))

    def limit_options(
        self, options: TrainOptions, plan: TrainPlan, local_epochs: int
    ) -> TrainOptions:
        """Return the options with at most this node's training time.

        Parameters
        ----------
        local_epochs
            Of a round. A plan of several rounds at once has that many times the run's time, but
            never more than the node's.
        """
        rounds = max(1, plan.local_epochs // local_epochs)
        seconds = [s for s in (rounds * options.max_seconds, self.max_seconds) if s]
        return replace(options, max_seconds=min(seconds, default=0.0))

    def limit_answers(self, options: GenerationOptions) -> GenerationOptions:
        """Return the options with at most this node's number and length of answers."""

        def least(asked: Any, allowed: Any) -> Any:
            return min((value for value in (asked, allowed) if value is not None), default=None)

        return replace(
            options,
            max_examples=least(options.max_examples, self.max_answers),
            max_new_tokens=least(options.max_new_tokens, self.max_answer_tokens),
            max_seconds=least(options.max_seconds, self.max_answer_seconds),
        )


def rank_from_memory(settings: Settings, limits: NodeLimits, most: int, num_labels: int) -> int:
    """Return the largest rank from 1 to ``most`` whose training step fits this node's memory.

    Raises
    ------
    DeviceMemoryError
        If not even rank 1 fits; with the memory needed and the memory there.
    """
    device = resolve_device(settings.client.device)
    usable = _usable_mb(settings, limits)
    needed = build.step_memory(settings, num_labels)
    rank = min(needed.largest_rank(usable), most)
    if rank == 0:
        raise DeviceMemoryError(
            f"{describe_device(device)}: rank 1 needs {needed.needed_mb(1):.0f} MB at "
            f"client.batch_size={settings.client.batch_size} and "
            f"dataset.max_length={settings.dataset.max_length}, and {usable:.0f} MB are usable"
        )
    return rank


def _usable_mb(settings: Settings, limits: NodeLimits) -> float:
    stated = limits.memory_mb or settings.ranks.memory_limit_mb
    device = resolve_device(settings.client.device)
    if stated is None:
        total = usable_memory_mb(device)
    else:
        # A GPU reports its memory, so a stated limit can only lower it.
        total = min(stated, usable_memory_mb(device)) if device.type == "cuda" else stated
    return total * (1 - settings.ranks.memory_margin)


def rank_budget(
    settings: Settings, limits: NodeLimits, tier: RankTier | None, num_labels: int
) -> RankTier:
    """Return a node's rank budget: its operator's limit, else by its memory or its tier.

    Parameters
    ----------
    tier
        Of its partition; None if it has none.

    Raises
    ------
    SettingsError
        If neither limit, memory nor tier gives one.
    DeviceMemoryError
        See `rank_from_memory`.
    """
    if limits.rank is not None:
        # What a device affords holds for every run; this one may need less.
        return RankTier(rank=min(limits.rank, settings.lora.max_rank))
    if settings.ranks.source == "memory":
        most = settings.lora.max_rank if tier is None else tier.rank
        return RankTier(rank=rank_from_memory(settings, limits, most, num_labels))
    if tier is None:
        raise SettingsError(
            f"a node without partition-id needs {RANK} in its --node-config, or ranks=from_memory"
        )
    return tier
