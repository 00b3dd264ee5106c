"""Settings of the data and of how they are shared out."""

from dataclasses import dataclass

from hafl_app.fields import REQUIRED, choice, number, setting


@dataclass(frozen=True)
class DatasetSettings:
    """Labeled text, prompts with answers, or labeled images: where they come from.

    Parameters
    ----------
    source
        Labeled text: ``banking77``, ``newsgroups``, ``local`` (your own files), ``synthetic``, or
        ``on_device``: each node has a file of its own, named by its operator. Prompts with
        answers, for ``model.task=causal_lm``: ``dolly``, ``gsm8k``, ``natural_instructions``, and
        ``local`` with an ``answer_column``. Conversations: ``local`` and ``on_device`` with a
        ``format``. Labeled images: ``digits``.
    path
        ``banking77``: folder with train.csv and test.csv, and categories.json if need be.
        ``newsgroups``: folder with a train and a test file with the columns label, subject and
        text, and labels.json. ``dolly``: folder with local_training_0.json and so on, and
        global_test.json. ``gsm8k``: folder with a train and a test file.
        ``natural_instructions``: folder of tasks, of which a tenth of the rows becomes the test
        set. ``local``: the training file, or a folder with a train and optionally a test file.
        Null: from the hub.
    test_path
        ``local``: the test file; null: a tenth of the training data is split off. ``on_device``:
        a test file on the server; null: the server scores nothing.
    hub
        Hub id of ``banking77``, ``newsgroups``, ``natural_instructions`` and, with conversations,
        ``local``; used without ``path``.
    revision
        Commit of the hub's repository; null: its newest.
    format
        ``columns``: the columns that the settings below name. Conversations, for
        ``model.task=causal_lm``, which the model's chat template writes: ``messages``,
        ``prompt_completion`` or ``instruction`` by the columns of that kind; ``chat``: the kind
        whose columns a file has, or with a ``template`` a user's message by it, and the answer
        column as the assistant's.
    system_prompt
        Conversations: first message of those that have no system message; null: none.
    text_column
        Column of the text in the files of ``banking77``, ``local`` and ``on_device``.
    label_column
        Column of the label in these files; with answers that of the category, empty: none.
    answer_column
        Column of the answers; null: text without any.
    template
        Template of the prompt from the other columns, each in braces; a paragraph whose columns are
        all blank is left out. Required with an ``answer_column``, but in a ``format`` of its own.
    label_names
        Names of the classes, in their order; null: those of the data. ``on_device``: null is all
        that the nodes have before round 1.
    max_length
        Tokens that a row is cut to; a row of which nothing of the answer is left is left out. Of
        a conversation the oldest exchanges go first.
    max_examples
        Rows of the training set, drawn at random; null: all. ``on_device``: rows of each node.
    max_test_examples
        Rows of the test set, drawn at random; null: all.
    task_fraction
        ``natural_instructions``: share of each task's rows that is used, drawn by ``data_seed``; of
        every task at least one row. The test set comes out of it.
    validation_fraction
        Share of the training data that no client gets, for choosing rounds and learning rates.
        ``on_device`` has none.
    holdout_fraction
        Share of each client's data that it does not train on, for its own evaluation.
    num_train
        ``synthetic``: number of training texts.
    num_test
        ``synthetic``: number of test texts.
    data_seed
        Seed of the order, the subsets, the test split and the synthetic texts.
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
    format: str = choice(
        "columns", "columns", "chat", "messages", "prompt_completion", "instruction"
    )
    system_prompt: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    answer_column: str | None = None
    template: str | None = None
    label_names: list[str] | None = setting(None, hashed=False)
    max_length: int = number(64, at_least=4)
    max_examples: int | None = number(None, at_least=1)
    max_test_examples: int | None = number(None, at_least=1)
    task_fraction: float = number(1.0, above=0, at_most=1)
    validation_fraction: float = number(0.1, at_least=0, below=1)
    holdout_fraction: float = number(0.1, at_least=0, below=1)
    num_train: int = number(4000, at_least=40)
    num_test: int = number(1000, at_least=20)
    data_seed: int = number(0, at_least=0)

    @property
    def has_conversations(self) -> bool:
        """Whether rows are conversations, which a chat template writes."""
        return self.format != "columns"

    @property
    def has_answers(self) -> bool:
        """Whether rows are prompts with answers, which a causal language model learns."""
        return self.has_conversations or bool(self.answer_column)


@dataclass(frozen=True)
class PartitionSettings:
    """Partition of the training data among clients, with flwr-datasets' partitioners.

    Parameters
    ----------
    kind
        ``iid``: equal random shares. ``dirichlet``: the rows of each class in shares drawn from
        a symmetric Dirichlet distribution. ``pathological``: each client has rows of a few
        classes only. ``natural``: one client per value of a column.
    dirichlet_alpha
        ``dirichlet``: concentration; the smaller, the more clients differ.
    classes_per_partition
        ``pathological``: classes of each client, at most those of the data.
    column
        ``natural``: column of the training data that names the owner of a row.
    min_examples
        Fewest rows that a client may have.
    """

    kind: str = choice("iid", "iid", "dirichlet", "pathological", "natural")
    dirichlet_alpha: float = number(0.5, above=0)
    classes_per_partition: int = number(5, at_least=1)
    column: str | None = None
    min_examples: int = number(4, at_least=2)
