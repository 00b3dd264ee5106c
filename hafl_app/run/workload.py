"""The work of a run, step by step, in texts that go through the base model.

What a run still takes is the work that is left times what a text cost so far; `hafl doctor`
multiplies the whole by what it measures.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hafl_app.config.schema import Settings
from hafl_app.run.device_gains import lone_clients
from hafl_app.run.watched_prompts import num_watched
from hafl_app.server.options import RunOptions
from hafl_app.wire.node_profile import NodeProfile

TRAINED = 3.0
"""What a text costs that is trained on, in texts that are only scored: the backward pass is two."""

_GENERATED_TOKENS = 4  # that cost about as much as a whole text


@dataclass(frozen=True)
class Step:
    """A step of a run.

    Parameters
    ----------
    stage
        A key of `hafl_app.tracking.closing.STAGES`.
    server_round
        Round it belongs to; the one after the last for what follows the rounds.
    texts
        Texts through the model in all, a trained one counted `TRAINED` times.
    longest
        Of those, the most that one client has; 0 for the server's own.
    """

    stage: str
    server_round: int
    texts: float
    longest: float = 0.0


@dataclass(frozen=True)
class CentralRows:
    """Rows that the server scores.

    Parameters
    ----------
    validation, test
        Rows of each; 0 where it scores none.
    """

    validation: int
    test: int


def client_texts(settings: Settings, num_examples: int) -> float:
    """Return what a client's training in one round costs, in texts."""
    client = settings.client
    trained = num_examples * client.local_epochs
    if client.max_steps and not client.tokens_per_step:  # whose steps have no number of rows
        trained = min(trained, client.max_steps * client.batch_size)
    return TRAINED * trained


def steps_of(
    settings: Settings,
    options: RunOptions,
    profiles: Sequence[NodeProfile],
    held_out: frozenset[int],
    rows: CentralRows,
) -> list[Step]:
    """Return the steps of a run with these nodes, in order.

    Parameters
    ----------
    held_out
        Partitions that never train.
    rows
        Of the server, none if it scores no adapters.
    """
    work = {p.partition_id: client_texts(settings, p.num_examples) for p in profiles}
    trainable = [p for p in profiles if p.partition_id not in held_out]
    unseen = [p for p in profiles if p.partition_id in held_out]
    return [
        *_rounds(settings, options, trainable, work, rows),
        *_after(settings, options.last_round, trainable, unseen, work, rows),
    ]


def _rounds(
    settings: Settings,
    options: RunOptions,
    trainable: Sequence[NodeProfile],
    work: Mapping[int, float],
    rows: CentralRows,
) -> Iterator[Step]:
    federation, every = settings.federation, settings.federation.test_every
    trained = [work[p.partition_id] for p in trainable] or [0.0]
    held = [_held_out_rows(settings, p) for p in trainable] or [0.0]
    for number in range(options.last_round + 1):
        scored = options.is_evaluated(number)
        if number:
            share = federation.fraction_train
            yield Step("train", number, share * sum(trained), max(trained))
        if number and scored and federation.fraction_evaluate:
            share = federation.fraction_evaluate
            yield Step("evaluate", number, share * sum(held), max(held))
        tested = number == options.last_round or (every and number % every == 0)
        central = scored * rows.validation + bool(tested) * rows.test
        watched = scored * num_watched(settings, rows.test)
        yield Step("score", number, central + _generated(watched, federation.watch_tokens))


def _after(
    settings: Settings,
    last_round: int,
    trainable: Sequence[NodeProfile],
    unseen: Sequence[NodeProfile],
    work: Mapping[int, float],
    rows: CentralRows,
) -> Iterator[Step]:
    """Yield what follows the last round: unseen clients, lone ones, and the final scores."""
    federation, after = settings.federation, last_round + 1
    if held := [_held_out_rows(settings, p) for p in unseen]:
        yield Step("unseen", after, sum(held), max(held))
    if federation.generate_on_clients:
        answering = [*trainable, *unseen]
        single = _generated(federation.generate_on_clients, federation.generate_tokens)
        yield Step("generate", after, len(answering) * single, single)
    lone = lone_clients(settings, trainable) if rows.test else []
    if lone:
        alone = [last_round * work[p.partition_id] for p in lone]
        for _ in range(1 + federation.alone_at_max_rank):
            yield Step("alone", after, sum(alone), max(alone))
    adapters = len(lone) * (1 + federation.alone_at_max_rank)
    if lone or federation.score_device_ranks:
        adapters += len({p.ranks for p in trainable}) - 1  # the largest is scored already
    if not federation.test_every and rows.validation:
        adapters += 1  # the best round's test scores
    answers = federation.generate_examples if rows.test else 0
    generated = _generated(answers, federation.generate_tokens)
    yield Step("finish", after, adapters * rows.test + generated)


def _generated(answers: int, tokens: int) -> float:
    """Return what written answers cost, in texts."""
    return answers * (1 + tokens / _GENERATED_TOKENS)


def _held_out_rows(settings: Settings, profile: NodeProfile) -> float:
    """Return about how many rows a client has held out, beside those that it trains on."""
    share = settings.dataset.holdout_fraction
    return profile.num_examples * share / (1 - share)
