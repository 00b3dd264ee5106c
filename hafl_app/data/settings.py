"""Settings of the data and of how they are shared out."""

from dataclasses import dataclass

from hafl_app.fields import REQUIRED, choice, number


@dataclass
class DatasetSettings:
    """Labeled text or images. `max_examples` limits the training set, for quick runs (null: all).

    With an `answer_column` the data are prompts and answers, for `model.task=causal_lm`: `template`
    makes the prompt of the other columns, each in braces, and leaves out a paragraph whose columns
    are all blank. `label_column` is then the category (empty: none). A row is cut to `max_length`
    tokens; where that leaves nothing of the answer it is left out.

    `validation_fraction` of the training data never reaches a client and serves for choosing
    rounds and learning rates; each client keeps `holdout_fraction` of its own data for evaluation.

    docs/data.md has the formats of files and the rules of labels. `label_names` are the classes in
    their order (null: those of the data). With `on_device` each node has a file of its own, named
    by its operator: `max_examples` then limits each node's rows, there is no validation split,
    `test_path` is a file on the server (null: it scores nothing), and null `label_names` are all
    that the nodes have before round 1.
    """

    source: str = choice(
        REQUIRED,
        "banking77",
        "newsgroups",
        "dolly",
        "gsm8k",
        "natural_instructions",
        "local",
        "synthetic",
        "digits",
        "on_device",
    )
    path: str | None = None
    test_path: str | None = None
    hub: str | None = None
    revision: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    answer_column: str | None = None
    template: str | None = None
    label_names: list[str] | None = None
    max_length: int = number(64, at_least=4)
    max_examples: int | None = number(None, at_least=1)
    max_test_examples: int | None = number(None, at_least=1)
    validation_fraction: float = number(0.1, at_least=0, below=1)
    holdout_fraction: float = number(0.1, at_least=0, below=1)
    num_train: int = number(4000, at_least=40)
    num_test: int = number(1000, at_least=20)
    data_seed: int = number(0, at_least=0)


@dataclass
class PartitionSettings:
    """How the training data is shared out: flwr-datasets' partitioners."""

    kind: str = choice("iid", "iid", "dirichlet", "pathological", "natural")
    dirichlet_alpha: float = number(0.5, above=0)
    classes_per_partition: int = number(5, at_least=1)
    column: str | None = None
    min_examples: int = number(4, at_least=2)
