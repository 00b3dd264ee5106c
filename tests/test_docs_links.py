"""The documentation points at what exists: pages, headings, files, groups and experiments."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GENERATED = {"docs/settings.md"}
_STRATEGIES = ROOT / "hafl_app" / "strategies"
PAGES = sorted(
    str(page.relative_to(ROOT)) for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
)
_LINK = re.compile(r"\]\((?!https?:|mailto:)([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
# A path of the repository wherever it stands: in text, in a command, in a table.
_PATH = re.compile(r"(?<![\w/.$-])(?:conf|docs|hafl_app|scripts|tests)/[\w./-]*\w/?")
_MODULE = re.compile(r"\bhafl_app(?:\.\w+)+")
_CHOICE = re.compile(
    r"(?<![\w.=])(client|dataset|experiment|federation|lora|model|partition|privacy|ranks|strategy"
    r"|tracking)=([a-z]\w*)"
)


def _text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def _anchors(page: Path) -> set[str]:
    """Headings as GitHub names them: lower case, no punctuation, dashes for blanks."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def _dead_links(page: str, text: str) -> Iterator[str]:
    for target in _LINK.findall(_FENCE.sub("", text)):
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        if str(file.resolve().relative_to(ROOT)) in GENERATED:
            continue
        if not file.exists() or (anchor and anchor not in _anchors(file)):
            yield target


def _missing_paths(text: str) -> Iterator[str]:
    without_links = _LINK.sub("](", text)
    for path in _PATH.findall(without_links):
        if not (ROOT / path).exists() and path not in GENERATED:
            yield path


def _missing_modules(text: str) -> Iterator[str]:
    for name in _MODULE.findall(text):
        parts = name.split(".")
        # The last part may be something in the module.
        found = (_module_exists(parts), _module_exists(parts[:-1]) and _defines(parts))
        if not any(found):
            yield name


def _module_exists(parts: list[str]) -> bool:
    path = ROOT.joinpath(*parts)
    return path.is_dir() or path.with_suffix(".py").is_file()


def _defines(parts: list[str]) -> bool:
    file = ROOT.joinpath(*parts[:-1]).with_suffix(".py")
    return file.is_file() and bool(re.search(rf"\b{parts[-1]}\b", file.read_text("utf-8")))


def _missing_choices(text: str) -> Iterator[str]:
    for group, choice in _CHOICE.findall(text):
        if not (ROOT / "conf" / group / f"{choice}.yaml").exists():
            yield f"{group}={choice}"


def _examples_of_new_methods(text: str) -> str:
    """Leave out code that a reader is to write."""
    return re.sub(r"<!-- new -->.*?<!-- end -->", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
class TestPage:
    def test_links_resolve(self, page):
        assert list(_dead_links(page, _text(page))) == []

    def test_paths_exist(self, page):
        assert list(_missing_paths(_examples_of_new_methods(_text(page)))) == []

    def test_modules_exist(self, page):
        assert list(_missing_modules(_examples_of_new_methods(_text(page)))) == []

    def test_choices_of_conf_exist(self, page):
        assert list(_missing_choices(_examples_of_new_methods(_text(page)))) == []


def test_every_page_is_in_the_index():
    # The table of methods is the index of their pages.
    index = set(_LINK.findall(_text("docs/README.md"))) | set(
        _LINK.findall(_text("docs/methods.md"))
    )

    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    missing = ", ".join(sorted(pages - {"README.md"} - index))
    assert not missing, f"docs/README.md (or docs/methods.md, of a method) has no row for {missing}"


def test_every_method_has_a_page():
    pages = {Path(page).stem for page in PAGES}
    methods = {file.stem for file in (ROOT / "conf" / "strategy").glob("*.yaml")}
    missing = ", ".join(sorted(methods - pages))
    assert not missing, f"no page for {missing}: write docs/methods/NAME.md"


def test_a_reconstruction_is_called_one_in_docstring_page_and_row():
    rows = dict(re.findall(r"^\| `(\w+)` (\|.*)$", _text("docs/methods.md"), re.MULTILINE))
    pages = {Path(page).stem: page for page in PAGES}
    methods = {file.stem: f"hafl_app/strategies/{file.name}" for file in _STRATEGIES.glob("*.py")}
    called = {
        name: {"econstruct" in text for text in (rows[name], _text(pages[name]), _text(path))}
        for name, path in methods.items()
        if name in rows
    }
    assert len(called) > 25
    assert [name for name, places in sorted(called.items()) if len(places) > 1] == []


def test_every_quoted_error_is_one_of_the_code():
    """Each row of the tables starts with words that stand in a message, `...` for what varies."""
    code = "".join(
        "".join(re.split(r'"\s*\n\s*f?"', file.read_text("utf-8")))
        for file in (ROOT / "hafl_app").rglob("*.py")
    )
    quoted = re.findall(r"^\| `([^`]+)`", _text("docs/troubleshooting.md"), re.MULTILINE)
    pieces = [piece.strip() for row in quoted for piece in row.split("...") if piece.strip()]
    assert len(quoted) > 25
    assert [piece for piece in pieces if piece not in code] == []


def test_every_figure_is_shown():
    shown = "".join(map(_text, PAGES))

    unused = [f.name for f in (ROOT / "docs" / "figures").iterdir() if f.name not in shown]
    assert unused == []


class TestTheCheckItself:
    """Each check finds what it is there to find."""

    def test_dead_links_and_headings(self):
        text = "[a](docs/no_such_page.md) [b](docs/faults.md#no-such-heading) [c](docs/faults.md)"

        assert list(_dead_links("README.md", text)) == [
            "docs/no_such_page.md",
            "docs/faults.md#no-such-heading",
        ]

    def test_missing_paths(self):
        text = "`scripts/no_such.py` and `python scripts/simulate.py`, see `hafl_app/federation/`"

        assert list(_missing_paths(text)) == ["scripts/no_such.py", "hafl_app/federation/"]

    def test_missing_modules(self):
        text = "hafl_app.cli hafl_app.cli.run_script hafl_app.cli.no_such hafl_app.node"

        assert list(_missing_modules(text)) == ["hafl_app.cli.no_such", "hafl_app.node"]

    def test_missing_choices(self):
        text = "experiment=demo strategy=no_such strategy=hafl"

        assert list(_missing_choices(text)) == ["strategy=no_such"]
