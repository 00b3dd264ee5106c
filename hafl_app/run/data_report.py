"""The data of a run before it trains: printed in 80 columns, and kept in its folder."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from rich.console import Console

from hafl_app.config.schema import Settings
from hafl_app.data.account import ClientRows, DataAccount
from hafl_app.data.combinations import ON_DEVICE
from hafl_app.data.shares import CentralText
from hafl_app.run import build
from hafl_app.run.example_row import print_example
from hafl_app.tracking.as_text import Printer
from hafl_app.training.prompts import token_decoder
from hafl_app.wire.node_profile import NodeProfile

DATA_FILE: Final = "data.json"

_MOST_CLIENTS = 20  # with a line each
_MOST_CLASSES = 5  # with a column each
_LONGEST_NAME = 10  # of a class


def report_data(
    settings: Settings,
    text: CentralText,
    profiles: Sequence[NodeProfile],
    folder: Path,
    console: Console | None = None,
) -> None:
    """Print what the data of a run are, and write `DATA_FILE` into its folder.

    Parameters
    ----------
    text
        The data that the server has.
    profiles
        Of the nodes; their number of partitions counts, whatever the settings say.
    folder
        Of the run.
    console
        Where to print; None for standard output.

    Raises
    ------
    hafl_app.data.errors.DataError
        If the data cannot be loaded or shared out.
    OSError
        If the file cannot be written.
    """
    if settings.dataset.source != ON_DEVICE and profiles:
        # What most say: one node's claim decides nothing.
        number = statistics.mode(profile.num_partitions for profile in profiles)
        text = build.federated_text(settings, number)
    # Prompts with answers must be tokenized, which a server that scores nothing may be unable to.
    account = text.account(by_tokens=settings.federation.central_evaluation)
    path = folder / DATA_FILE
    path.write_text(json.dumps(account.to_json(), indent=1) + "\n", encoding="utf-8")
    printer = Printer(console)
    for line in data_lines(account):
        printer.line(line)
    if account.tokens and (example := text.example()) is not None:
        print_example(example, token_decoder(build.base_spec(settings)), console)


def data_lines(account: DataAccount) -> list[str]:
    """Return the account as lines; notes with long names may have more than `WIDTH` characters."""
    lines = ["Data"]
    empty = sum(count == 0 for count in account.labels.values())
    if account.clients:
        trained = sum(client.train for client in account.clients)
        held = sum(client.holdout for client in account.clients)
        lines.append(
            f"  training   {trained:>9,} rows on {len(account.clients)} clients, {held:,} held out"
        )
    lines += [
        *(
            f"  {split:<10} {count:>9,} rows"
            for split, count in (("validation", account.validation), ("test", account.test))
            if count
        ),
        *(f"  dropped    {count:>9,} rows: {reason}" for reason, count in account.dropped.items()),
        *_tokens(account),
        f"  classes    {len(account.label_names):>9,}{_spread(account.labels)}",
        *([f"  unused     {empty:>9,} classes without a training row"] if empty else []),
        *(f"  note: {note}" for note in account.notes),
    ]
    if account.clients and account.label_names:
        lines += ["Training rows by class and client", *_clients(account)]
    return lines


def _tokens(account: DataAccount) -> list[str]:
    """Describe the tokens of the training rows, if they have answers."""
    if not account.tokens:
        return []
    share = account.answer_tokens / account.tokens
    return [
        f"  tokens     {account.tokens:>9,} in training, {share:.1%} of which count in the loss",
        f"  cut        {account.cut:>9,} training rows, to dataset.max_length",
    ]


def _spread(labels: Mapping[str, int]) -> str:
    """Describe the training rows of the smallest and the largest class that have any."""
    found = {name: count for name, count in labels.items() if count}
    if not found:
        return ""
    least, most = (chosen(found, key=lambda name: found[name]) for chosen in (min, max))
    return f": {found[least]:,} ({_shown(least)}) to {found[most]:,} ({_shown(most)}) rows"


def _clients(account: DataAccount) -> list[str]:
    if len(account.clients) > _MOST_CLIENTS:
        return _summary(account.clients)
    if len(account.label_names) > _MOST_CLASSES:
        header = ["client", "rows", "classes", "largest", "share"]
        rows = [_brief(number, client) for number, client in enumerate(account.clients)]
    else:
        names = account.label_names
        header = ["client", "rows", *map(_shown, names)]
        rows = [
            [str(number), f"{client.train:,}", *(f"{client.labels.get(n, 0):,}" for n in names)]
            for number, client in enumerate(account.clients)
        ]
    return _aligned([header, *rows])


def _brief(number: int, client: ClientRows) -> list[str]:
    share, name = _largest(client)
    return [
        str(number), f"{client.train:,}", str(len(client.labels)), _shown(name), f"{share:.0%}"
    ]  # fmt: skip


def _summary(clients: Sequence[ClientRows]) -> list[str]:
    measured: dict[str, list[int] | list[float]] = {
        "rows": [client.train for client in clients],
        "classes": [len(client.labels) for client in clients],
        "largest class": [_largest(client)[0] for client in clients],
    }
    rows = []
    for name, values in measured.items():
        cells = (min(values), statistics.median(values), max(values))
        is_share = name == "largest class"
        rows.append([name, *(f"{v:.0%}" if is_share else f"{v:,.0f}" for v in cells)])
    return _aligned([["each client", "min", "median", "max"], *rows])


def _largest(client: ClientRows) -> tuple[float, str]:
    """Return share and name of a client's largest class."""
    if not client.labels:
        return 0.0, "-"
    name = max(client.labels, key=lambda label: client.labels[label])
    return client.labels[name] / client.train, name


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]


def _shown(name: str) -> str:
    """Return a class's name in so few characters that a terminal shows as what they are."""
    plain = "".join(c if c.isprintable() else "?" for c in name)
    return plain if len(plain) <= _LONGEST_NAME else f"{plain[: _LONGEST_NAME - 3]}..."
