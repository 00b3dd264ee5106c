"""`hafl chat`: prompts typed into the terminal, answered by a saved adapter."""

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hafl_app.cli import REFUSED, run_script
from hafl_app.printable import printable

if TYPE_CHECKING:
    from rich.console import Console

    from hafl_app.experiments.chat import Chat

_ENDING: Final = ("exit", "quit", "/exit", "/quit")
_RESET: Final = "/reset"
_COMMAND: Final = re.compile(r"/\w+")  # a longer line that begins so is a prompt
_LONGEST: Final = 100_000  # characters of a line: the answer's tokens are bounded
_GAP: Final = "  "
_NARROWEST: Final = 36  # columns of an answer that stands beside others


def main(source: Path, prompt: str | None, compare: str | None, **how: Any) -> int:
    """Answer a prompt, or all that are typed or piped in; return the exit code.

    Parameters
    ----------
    source
        Folder of a run, or of an adapter.
    prompt
        To be answered alone; None: read from standard input.
    compare
        Who answers, see `hafl_app.experiments.chat_request.read_request`.
    how
        Other fields of `hafl_app.experiments.chat_request.ChatRequest`.
    """
    return run_script(lambda: _chat(source, prompt, compare, how), interrupted="")


def _chat(source: Path, prompt: str | None, compare: str | None, how: dict[str, Any]) -> int:
    from hafl_app.experiments.chat_request import read_request  # noqa: PLC0415

    if prompt is not None and not prompt.strip():
        raise ValueError("the prompt is blank")
    request = read_request(source, compare, **how)
    from hafl_app.experiments.chat import Chat  # noqa: PLC0415  takes seconds

    chat = Chat(request)
    if not chat.knows_its_prompt:
        print("note: the prompt of its training is not known; yours goes as it is", file=sys.stderr)
    if prompt is not None:
        _show(chat, prompt)
        return 0
    return _talk(chat, request.folder) if sys.stdin.isatty() else _answer_lines(chat)


def _talk(chat: "Chat", folder: Path) -> int:
    from hafl_app.experiments.chat import PromptError  # noqa: PLC0415
    from hafl_app.tracking.as_text import Printer  # noqa: PLC0415

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, PLC0415  gives `input` a history
    printer = Printer()
    printer.path(printable(folder, _LONGEST))
    if chat.keeps_turns:
        printer.line("A conversation: /reset begins another one. Ctrl-D or /exit ends it.")
    else:
        printer.line("Every line is a prompt by itself. Ctrl-D or /exit ends it.")
    for typed in _typed():
        try:
            _obey(chat, typed) if _COMMAND.fullmatch(typed.strip()) else _show(chat, typed)
        except PromptError as error:
            printer.line(printable(error))
    return 0


def _obey(chat: "Chat", command: str) -> None:
    """Do what a line that begins with a slash asks for.

    Raises
    ------
    hafl_app.experiments.chat.PromptError
        If there is no such command.
    """
    from hafl_app.data.errors import nearest  # noqa: PLC0415
    from hafl_app.experiments.chat import PromptError  # noqa: PLC0415

    name = command.strip().lower()
    if name != _RESET:
        raise PromptError(f"{name}: expected {_RESET} or /exit{nearest(name, (_RESET, '/exit'))}")
    chat.reset()


def _typed() -> Iterator[str]:
    """Yield what is typed, until the end of the input or a word that ends it."""
    while True:
        try:
            typed = input("> ")
        except EOFError:
            print()
            return
        if typed.strip().lower() in _ENDING:
            return
        if typed.strip():
            yield typed


def _answer_lines(chat: "Chat") -> int:
    """Answer the lines of a pipe or a file, an empty line behind each."""
    from hafl_app.experiments.chat import PromptError  # noqa: PLC0415

    code = 0
    for number, line in enumerate(sys.stdin, 1):
        if not line.strip():
            continue
        chat.reset()  # each line is a prompt by itself
        try:
            _show(chat, line.rstrip("\r\n"))
        except PromptError as error:
            print(f"error: line {number}: {printable(error)}", file=sys.stderr)
            code = REFUSED
        print(flush=True)
    return code


def _show(chat: "Chat", prompt: str) -> None:
    """Print the answers to a prompt: side by side where there is room, else with their titles."""
    from hafl_app.tracking.as_text import Printer, standard_output  # noqa: PLC0415

    console, count = standard_output(), len(chat.speakers)
    if console.is_terminal and 1 < count <= (console.width + len(_GAP)) // (_NARROWEST + len(_GAP)):
        _show_beside(chat, prompt, console)
        return
    printer = Printer(console)
    width = max(map(len, chat.speakers)) if len(chat.speakers) > 1 else 0
    indent = " " * width + _GAP if width else ""
    for title, answer in chat.answers(prompt):
        start = f"{title:<{width}}{_GAP}" if width else ""
        for line in _safe_lines(answer):
            printer.line(start + line, indent=indent)
            start = indent


def _show_beside(chat: "Chat", prompt: str, console: "Console") -> None:
    """Print the answers to a prompt in columns as wide as the terminal, once all are written."""
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, padding=(0, len(_GAP), 0, 0), expand=True)
    cells = []
    with console.status("writing"):
        for title, answer in chat.answers(prompt):
            table.add_column(Text(title), ratio=1, overflow="fold")
            cells.append(Text("\n".join(_safe_lines(answer))))
    table.add_row(*cells)
    console.print(table, highlight=False)


def _safe_lines(answer: str) -> list[str]:
    """Return the lines of an answer as a terminal can show them, indented as they were."""
    lines = answer.strip().splitlines() or ["(no answer)"]
    return [" " * (len(line) - len(line.lstrip(" "))) + printable(line, _LONGEST) for line in lines]
