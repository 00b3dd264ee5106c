"""Foreign text made safe to show: what a node, a file or a user wrote, on one line and cut.

Standard library only.
"""

import html
import re
import unicodedata

_LONGEST, _CUT = 300, "..."
_MARKUP = re.compile(
    r"[\\`*\[\]|~$]"  # emphasis, code, links, cells, formulas
    r"|(?<![^\W_])_|_(?![^\W_])"  # an underscore within a word marks nothing up
    r"|:(?=//)|(?<=\bwww)\."  # bare addresses become links
)
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@'\"]+@")  # user and password of an address
# Controls, what changes the direction of a line, ends of lines, and what no file can hold.
_UNSAFE = {"Cc", "Cf", "Zl", "Zp", "Cs"}


def printable(text: object, longest: int = _LONGEST) -> str:
    """Return text for a terminal, a log or a page: one line, controls as escapes, cut if long.

    Line breaks and runs of white space become one space; any other control character is written
    as Python would escape it, so that no text moves a cursor, forges a line or hides a part of
    itself.

    Parameters
    ----------
    longest
        Most characters of the result, at least 3; text that is cut ends in ``...``.
    """
    # Nothing behind what is shown is looked at: a foreign text may be megabytes long.
    start = str(text)[: 4 * longest]
    words = " ".join(start.split())
    safe = "".join(_escaped(character) for character in words)
    if len(safe) > longest or len(str(text)) > len(start):
        return f"{safe[: longest - len(_CUT)]}{_CUT}"
    return safe


def without_credentials(text: object) -> str:
    """Return text whose addresses name no user and no password."""
    return _CREDENTIALS.sub("", str(text))


def markdown_text(text: object, longest: int = _LONGEST) -> str:
    """Return text that Markdown and HTML show as it is, within a line or a cell of a table.

    What Markdown would take for markup is written with a backslash, ``&``, ``<`` and ``>`` as
    entities. At the start of a line put words of your own before it.

    Parameters
    ----------
    longest
        Most characters of what is shown, see `printable`.
    """
    return _MARKUP.sub(r"\\\g<0>", html.escape(printable(text, longest), quote=False))


def markdown_code(text: object, longest: int = _LONGEST) -> str:
    """Return text as a span of code, outside of tables; backticks in it do not end the span."""
    shown = printable(text, longest)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    space = " " if not shown or "`" in (shown[0], shown[-1]) else ""
    return f"{fence}{space}{shown}{space}{fence}"


def figure_text(text: object, longest: int = _LONGEST) -> str:
    """Return text that Matplotlib draws as it is: a ``$`` starts no formula."""
    return printable(text, longest).replace("$", r"\$")


def python_text(text: str) -> str:
    """Return a literal of Python, in double quotes and on one line, that evaluates to the text.

    No row of backticks is in it, so that it can stand in a fenced block of Markdown.
    """
    literal = repr(text)
    if literal[0] == "'":
        literal = '"' + literal[1:-1].replace('"', r"\"") + '"'
    return literal.replace("```", r"\x60\x60\x60")


def _escaped(character: str) -> str:
    if unicodedata.category(character) in _UNSAFE:
        return character.encode("unicode_escape", errors="replace").decode("ascii")
    return character
