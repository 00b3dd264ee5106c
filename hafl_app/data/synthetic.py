"""Embedded data set: short texts of 20 overlapping topics, generated from a seed.

Nothing is downloaded. A text mentions a few concepts of its own topic among
distractors from other topics; neighbouring topics share concepts. Training and
test texts name the same concepts by different nouns, so a bag of words learns
next to nothing that carries over: a model has to know what the nouns mean.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

from hafl_app.data.synthetic_words import CONCEPT_TABLE

OWN_CONCEPTS: Final = 4
"""Concepts of the text's own topic, those it shares with a neighbour included."""

DISTRACTORS: Final = 2
"""Concepts of other topics, the neighbours included."""

# Every template has OWN_CONCEPTS + DISTRACTORS slots. They fit any noun and both
# sides of the word table use them, so that the sentence itself tells nothing.
TEMPLATES: Final = (
    "we saw the {}, the {} and the {} before anyone mentioned the {}, the {} or the {}",
    "she wrote about the {} and the {}, then about the {}, the {}, the {} and the {}",
    "first came the {}, followed by the {}, the {} and the {}, and finally the {} and the {}",
    "after the {} and the {}, nobody expected the {} or the {}, let alone the {} and the {}",
    "my brother asked about the {} and the {}; I only remember the {}, the {}, the {} and the {}",
    "a picture of the {} and the {} hung beside one of the {}, the {}, the {} and the {}",
    "it began with the {} and ended with the {}; the {}, the {}, the {} and the {} lay in between",
    "he compared the {} with the {}, while the others spoke of the {}, the {}, the {} and the {}",
    "some people care for the {}, the {} and the {}, others for the {}, the {} or even the {}",
    "without the {} and the {} there is no {}, and without the {} and the {} there is no {}",
    "a story about the {} and the {} needs the {}, he said, and also the {}, the {} and the {}",
    "they took notes on the {} and the {}, missed the {} and the {}, and kept the {} and the {}",
)


@dataclass(frozen=True)
class Concept:
    """One meaning, the topics it belongs to, and its nouns in training and in test texts."""

    topics: tuple[str, ...]
    train_nouns: tuple[str, ...]
    test_nouns: tuple[str, ...]


def parse_concepts(table: str) -> tuple[Concept, ...]:
    """Read the word table.

    Parameters
    ----------
    table : str
        Sections ``[topic]`` or ``[topic neighbour]``, each followed by lines
        ``train nouns | test nouns``.

    Returns
    -------
    tuple[Concept, ...]
        The concepts in the order of the table.
    """
    concepts = []
    topics: tuple[str, ...] = ()
    for line in table.split("\n"):
        if line.startswith("["):
            topics = tuple(line.strip("[]").split())
        elif line:
            train_nouns, test_nouns = line.split("|")
            concepts.append(Concept(topics, tuple(train_nouns.split()), tuple(test_nouns.split())))
    return tuple(concepts)


CONCEPTS: Final = parse_concepts(CONCEPT_TABLE)
LABEL_NAMES: Final = tuple(dict.fromkeys(topic for c in CONCEPTS for topic in c.topics))


def generate(
    num_train: int, num_test: int, seed: int
) -> tuple[list[str], list[int], list[str], list[int], tuple[str, ...]]:
    """Generate the data set.

    The two halves come from independent random streams: the test texts of a seed
    stay the same whatever ``num_train`` is.

    Parameters
    ----------
    num_train, num_test : int
        Number of texts, at least 1. Labels are balanced to within one text, so
        every label occurs as soon as there are 20 texts.
    seed : int
        The same seed gives the same texts on every platform.

    Returns
    -------
    tuple[list[str], list[int], list[str], list[int], tuple[str, ...]]
        Training texts, training labels, test texts, test labels, and the label
        names; label ``i`` is the topic ``label_names[i]``.

    Raises
    ------
    ValueError
        If ``num_train`` or ``num_test`` is below 1.
    """
    for name, value in (("num_train", num_train), ("num_test", num_test)):
        if value < 1:
            raise ValueError(f"synthetic data: {name} is {value}, expected at least 1")
    train_nouns = {concept: concept.train_nouns for concept in CONCEPTS}
    test_nouns = {concept: concept.test_nouns for concept in CONCEPTS}
    train_texts, train_labels = _split(num_train, train_nouns, Random(f"train {seed}"))
    test_texts, test_labels = _split(num_test, test_nouns, Random(f"test {seed}"))
    return train_texts, train_labels, test_texts, test_labels, LABEL_NAMES


def _split(
    size: int, nouns: Mapping[Concept, Sequence[str]], rng: Random
) -> tuple[list[str], list[int]]:
    """Return ``size`` texts and their labels, balanced and shuffled."""
    labels = [index % len(LABEL_NAMES) for index in range(size)]
    rng.shuffle(labels)
    return [_text(LABEL_NAMES[label], nouns, rng) for label in labels], labels


def _text(topic: str, nouns: Mapping[Concept, Sequence[str]], rng: Random) -> str:
    """Return one text: own concepts and distractors in random order in a template."""
    own = [concept for concept in CONCEPTS if topic in concept.topics]
    foreign = [concept for concept in CONCEPTS if topic not in concept.topics]
    chosen = rng.sample(own, OWN_CONCEPTS) + rng.sample(foreign, DISTRACTORS)
    rng.shuffle(chosen)
    sentence = rng.choice(TEMPLATES).format(*(rng.choice(nouns[concept]) for concept in chosen))
    return sentence[0].upper() + sentence[1:] + "."
