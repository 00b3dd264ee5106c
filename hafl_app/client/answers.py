"""Answers that a node writes to its own held-out prompts: only their scores leave it."""

from hafl_app.client.node import Job, Node
from hafl_app.client.permissions import NotAllowedError
from hafl_app.client.rank_budget import MAX_ANSWERS
from hafl_app.config.compose import SettingsError
from hafl_app.data.errors import UnfitDataError
from hafl_app.packages import MissingPackageError
from hafl_app.run import build
from hafl_app.training.answers import GenerationScores, require_rouge
from hafl_app.training.generate import GenerationOptions, NoAnswerError, score_generation

_AT_ONCE = 8  # prompts: what is cut short by the time limit is at most this many


def check_answers(node: Node) -> None:
    """Refuse to write answers where that is not allowed, or cannot be scored.

    Raises
    ------
    NotAllowedError
        If the node's operator allows none.
    SettingsError
        If the run asks for none, or a package is not there.
    """
    asked = f"federation.generate_on_clients={node.settings.federation.generate_on_clients}"
    if node.limits.max_answers == 0:
        raise NotAllowedError(f"{asked}: this node writes none, {MAX_ANSWERS} in its --node-config")
    if not node.settings.federation.generate_on_clients:
        raise SettingsError(f"{asked}: the run's settings ask for no answers")
    try:
        require_rouge()
    except MissingPackageError as error:  # whose message says where this node's packages are
        raise SettingsError(f"{asked}: rouge-score is not installed on this node") from error


def score_held_out(node: Node, job: Job) -> GenerationScores:
    """Answer held-out prompts with the factors that the model holds now, and score the answers.

    As many, as long and for as many seconds as the run asks for and the node allows.

    Raises
    ------
    UnfitDataError
        If there is no prompt that can be answered.
    """
    if job.share.holdout_pairs is None:
        raise UnfitDataError("federation.generate_on_clients: this node has no prompts", "")
    settings = node.settings
    options = node.limits.limit_answers(
        GenerationOptions(
            settings.dataset.max_length,
            settings.federation.generate_tokens,
            settings.federation.generate_on_clients,
            batch_size=_AT_ONCE,
            precision=settings.client.precision,
            max_seconds=settings.federation.generate_seconds,
        )
    )
    pairs = job.share.holdout_pairs()
    if not pairs.prompts:
        fraction = settings.dataset.holdout_fraction
        raise UnfitDataError(
            f"dataset.holdout_fraction={fraction}: this node has no row to answer",
            f"{job.share.num_examples} rows in all",
        )
    base = build.base_spec(settings)
    try:
        return score_generation(job.model, base, pairs.prompts, pairs.answers, options)
    except NoAnswerError as error:  # made of counts and settings
        raise UnfitDataError(str(error), f"{len(pairs.prompts)} prompts") from error
