"""Embedded data set: short texts of 20 overlapping topics, generated from a seed.

Nothing is downloaded. A text is about three concepts of its topic and sets aside
two of a rival topic; neighboring topics share concepts. Training and test texts
name the same concepts by different nouns, so nothing that a bag of words learns
carries over: a model has to know what the nouns mean. The sentence shows which
nouns are set aside, so it also pays to read them in context.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

from hafl_app.data.synthetic_words import CONCEPT_TABLE

OWN_CONCEPTS: Final = 3
"""Concepts of the text's own topic, those it shares with a neighbor included."""

DISTRACTORS: Final = 2
"""Concepts of the rival topic, none of them shared with the text's own topic."""

# Slots 0, 1, 2 take the own concepts and 3, 4 the distractors, before or after them.
# The slots fit any noun, and both sides of the word table use every template, so that
# a template by itself has no information about the label.
TEMPLATES: Final = (
    "it was about the {0}, the {1} and the {2}, and not about the {3} or the {4}",
    "instead of the {3} and the {4} they chose the {0}, the {1} and the {2}",
    "forget the {3} and the {4}, and remember the {0}, the {1} and the {2}",
    "she wrote about the {0}, the {1} and the {2} rather than the {3} or the {4}",
    "he ignored the {3} and the {4} and studied the {0}, the {1} and the {2}",
    "there was no sign of the {3} or the {4}, only of the {0}, the {1} and the {2}",
    "we wanted the {0}, the {1} and the {2}, but never the {3} or the {4}",
    "nobody asked for the {3} or the {4}, everybody for the {0}, the {1} and the {2}",
    "they kept the {0}, the {1} and the {2} and threw away the {3} and the {4}",
    "the {0}, the {1} and the {2} mattered here, unlike the {3} and the {4}",
)


@dataclass(frozen=True)
class Concept:
    """Meaning with the topics it belongs to, and its nouns in training and in test texts."""

    topics: tuple[str, ...]
    train_nouns: tuple[str, ...]
    test_nouns: tuple[str, ...]


def parse_concepts(table: str) -> tuple[Concept, ...]:
    """Read the word table.

    Parameters
    ----------
    table : str
        Sections ``[topic]`` or ``[topic neighbor]``, each followed by lines
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
    """Return one text: own concepts and a rival topic's, put into a template."""
    rival = rng.choice([name for name in LABEL_NAMES if name != topic])
    own = [c for c in CONCEPTS if topic in c.topics]
    foreign = [c for c in CONCEPTS if rival in c.topics and topic not in c.topics]
    chosen = rng.sample(own, OWN_CONCEPTS) + rng.sample(foreign, DISTRACTORS)
    sentence = rng.choice(TEMPLATES).format(*(rng.choice(nouns[concept]) for concept in chosen))
    return sentence[0].upper() + sentence[1:] + "."
