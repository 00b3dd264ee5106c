"""Scores of generated answers against the expected ones: Rouge-L, and exact match."""

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Final

from hafl_app.metrics import EXACT_MATCH, ROUGE_L
from hafl_app.packages import require

_MARKER: Final = "####"  # GSM8K: the final number follows
_NUMBER: Final = re.compile(
    # A minus behind a digit is a subtraction; a dot without digits behind it ends a sentence.
    r"(?P<minus>(?<!\d)[-\u2212])?(?:[$\u20ac\u00a3](?P<inner>[-\u2212])?)?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
)
_NO_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class GenerationScores:
    """Scores of generated answers.

    Parameters
    ----------
    rouge_l
        Mean F1 of the longest common subsequence of words, in [0, 1].
    exact_match
        Share that is right, in [0, 1], see `is_exact`.
    num_examples
        Answers that were generated.
    left_out
        Prompts that leave no room for an answer.
    unanswered
        Prompts for whose answers there was no time.
    by_category
        Scores of each category's answers; empty where no categories were given.
    """

    rouge_l: float
    exact_match: float
    num_examples: int
    left_out: int = 0
    unanswered: int = 0
    by_category: Mapping[str, "GenerationScores"] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Return the two scores by name."""
        return {ROUGE_L.name: self.rouge_l, EXACT_MATCH.name: self.exact_match}

    def categories(self) -> dict[str, dict[str, float]]:
        """Return the scores of each category by name, with ``num_examples``."""
        return {
            name: {**its.metrics(), "num_examples": its.num_examples}
            for name, its in self.by_category.items()
        }

    def to_wire(self) -> dict[str, float | int]:
        """Return a node's report, by name; all of it is finite."""
        return {
            **self.metrics(),
            "num-examples": self.num_examples,
            "left-out": self.left_out,
            "unanswered": self.unanswered,
        }

    def to_json(self) -> dict[str, float | int]:
        """Return all scores by name, but those of categories."""
        return {**self.metrics(), "num_examples": self.num_examples, "left_out": self.left_out}


def require_rouge() -> None:
    """Refuse in one line where Rouge-L cannot be measured.

    Raises
    ------
    hafl_app.packages.MissingPackageError
        If the package ``rouge-score`` is not installed.
    """
    require("rouge-score", "rouge-l")


def score_answers(
    answers: Sequence[str],
    references: Sequence[str],
    left_out: int = 0,
    *,
    unanswered: int = 0,
    categories: Sequence[str] = (),
) -> GenerationScores:
    """Score generated answers against the expected ones, one of each per prompt.

    Parameters
    ----------
    left_out, unanswered
        See `GenerationScores`.
    categories
        Category of each answer; empty for none.

    Raises
    ------
    ValueError
        If there is no answer, or not one reference for each.
    hafl_app.packages.MissingPackageError
        See `require_rouge`.
    """
    if not answers or len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers for {len(references)} references")
    right = list(map(is_exact, answers, references))
    rouge = rouge_l(answers, references)

    def mean_over(rows: Sequence[int]) -> GenerationScores:
        count = len(rows)
        return GenerationScores(
            sum(rouge[row] for row in rows) / count, sum(right[row] for row in rows) / count, count
        )

    rows_of: dict[str, list[int]] = {}
    for row, name in enumerate(categories):
        rows_of.setdefault(name, []).append(row)
    by_category = {name: mean_over(rows) for name, rows in sorted(rows_of.items())}
    whole = mean_over(range(len(answers)))
    return replace(whole, left_out=left_out, unanswered=unanswered, by_category=by_category)


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """Return the Rouge-L F1 of each answer, words stemmed.

    Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", ACL 2004; with Google's
    ``rouge-score``, as Natural Instructions and FlexLoRA measure it. An empty answer scores 0.

    Raises
    ------
    hafl_app.packages.MissingPackageError
        See `require_rouge`.
    """
    require_rouge()
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415  optional, takes a second
    from rouge_score.tokenizers import DefaultTokenizer  # noqa: PLC0415

    # Left to choose it, the scorer logs that, and absl then takes over the root logger.
    scorer = RougeScorer(["rougeL"], tokenizer=DefaultTokenizer(use_stemmer=True))
    return [
        float(scorer.score(reference, answer)["rougeL"].fmeasure)
        for answer, reference in zip(answers, references, strict=True)
    ]


def is_exact(answer: str, reference: str) -> bool:
    """Whether an answer matches exactly.

    Where the reference has a final number behind ``####``, the answer's must be equal to it, as
    numbers: 18, 18.00 and $18 are. Else both must be the same words, whatever their case,
    punctuation and spaces.
    """
    if _MARKER in reference:
        expected = final_number(reference)
        return expected is not None and final_number(answer) == expected
    return _words(answer) == _words(reference)


def final_number(text: str) -> Decimal | None:
    """Return the number that an answer ends in; None if it has none.

    That is the first behind the first ``####``: what a model goes on to write after its answer
    does not count. Without the marker it is the last number of the text.

    Cobbe et al., "Training Verifiers to Solve Math Word Problems", arXiv:2110.14168. Differs from
    the paper's script, which counts nothing without the marker and compares numbers as text.
    """
    _, marker, behind = text.partition(_MARKER)
    if marker:
        first = _NUMBER.search(behind)
        return _value(first) if first else None
    numbers = list(_NUMBER.finditer(text))
    return _value(numbers[-1]) if numbers else None


def _value(found: re.Match[str]) -> Decimal:
    size = Decimal(found["digits"].replace(",", ""))
    return -size if found["minus"] or found["inner"] else size


def _words(text: str) -> list[str]:
    return text.lower().translate(_NO_PUNCTUATION).split()
