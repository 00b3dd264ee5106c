"""Foreign text made safe to show: what a node, a file or a user wrote, on one line and cut.

Standard library only.
"""

import unicodedata

_LONGEST, _CUT = 300, "..."
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


def _escaped(character: str) -> str:
    if unicodedata.category(character) in _UNSAFE:
        return character.encode("unicode_escape", errors="replace").decode("ascii")
    return character
