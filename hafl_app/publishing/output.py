"""Folders that appear whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_output(output: Path, source: Path, *, force: bool) -> None:
    """Refuse to write where something is, or where an export would remove what is still needed.

    Parameters
    ----------
    output
        The folder to be written.
    source
        What is exported.
    force
        Replace what is there.

    Raises
    ------
    ValueError
        If ``output`` is a file or below one, holds something without ``force``, holds ``source``
        or the current folder, or is in ``source``.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output}: expected a folder, it is a file")
    if output.is_dir() and any(output.iterdir()) and not force:
        raise ValueError(f"--output {output}: not empty; --force replaces it and all it holds")
    for kept in (source, Path.cwd()):
        if kept.resolve().is_relative_to(output.resolve()):
            raise ValueError(f"--output {output}: would replace {kept}, give another folder")
    if output.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"--output {output}: is in what is exported, give another folder")
    if file := next((p for p in output.absolute().parents if p.exists() and not p.is_dir()), None):
        raise ValueError(f"--output {output}: {file} is a file")


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``output`` if all goes well, and is removed if not."""
    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside it, so that it is on the same disk and can be renamed.
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        scratch.chmod(0o755)
        yield scratch
        _replace(output, scratch)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _replace(output: Path, scratch: Path) -> None:
    if not output.exists():
        scratch.replace(output)
        return
    # A folder can only be renamed onto an empty one: the old one steps aside first.
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}-old-", dir=output.parent))
    output.replace(aside)
    try:
        scratch.replace(output)
    except BaseException:
        aside.replace(output)
        raise
    shutil.rmtree(aside, ignore_errors=True)
