"""MkDocs' hooks: the navigation follows docs/README.md, and the project's README is a page too."""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

_DOCS = Path(__file__).parents[1]
_PROJECT = "project.md"
_ROW = re.compile(r"^\| \[([^\]]+)\]\(([^)#]+\.md)\) \|", re.MULTILINE)
_METHOD = re.compile(r"\]\((methods/[^)#]+\.md)\)")


def navigation(docs: Path) -> list[dict[str, Any]]:
    """Return the sections of the index with their pages; those of methods in a section of theirs.

    Raises
    ------
    ValueError
        In one line, with the pages that no table names.
    """
    index = (docs / "README.md").read_text(encoding="utf-8")
    pages: list[dict[str, Any]] = [{"Documentation": "README.md"}, {"Overview": _PROJECT}]
    for section in index.split("\n## ")[1:]:
        title = section.partition("\n")[0]
        rows: list[Any] = [
            {name[0].upper() + name[1:]: page} for name, page in _ROW.findall(section)
        ]
        if title == "Methods":
            rows.append({"Each method": _methods(docs)})
        pages.append({title: rows})
    missing = sorted(
        page
        for page in {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
        if f"'{page}'" not in repr(pages) and not page.startswith("site/")
    )
    if missing:
        raise ValueError(
            f"docs/README.md (or for a method docs/methods.md) has no row for {', '.join(missing)}"
        )
    return pages


def _methods(docs: Path) -> list[str]:
    found = _METHOD.findall((docs / "methods.md").read_text(encoding="utf-8"))
    return list(dict.fromkeys(found))


def on_config(config: Any) -> Any:
    """Give MkDocs the navigation."""
    try:
        config.nav = navigation(Path(config.docs_dir))
    except ValueError as error:
        raise PluginError(str(error)) from error
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the project's README as a page."""
    text = (_DOCS.parent / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\]\(docs/", "](", text).replace("](LICENSE)", "](#citations-and-license)")
    files.append(File.generated(config, _PROJECT, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead links to the project's README to its page."""
    return re.sub(r"\]\((?:\.\./)+README\.md", f"]({_PROJECT}", markdown)
