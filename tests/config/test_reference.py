"""`docs/settings.md` is written from the schema, with every setting."""

import dataclasses
import re

import pytest

from hafl_app.config.files import CONF
from hafl_app.config.reference import descriptions, settings_reference
from hafl_app.config.schema import declared_settings, resumable_settings

PAGE = CONF.parent / "docs" / "settings.md"


@pytest.fixture(scope="module")
def page():
    return settings_reference()


def section(page: str, heading: str) -> str:
    return re.split(r"^#{2,3} ", page.partition(f"\n{heading}\n")[2], flags=re.MULTILINE)[0]


def without_new_methods(page: str, shipped: str) -> str:
    """Leave out the sections of methods that the page on disk does not have: somebody's own."""
    for section_of in re.findall(r"^### .*?(?=^##)", page, re.M | re.S):
        if section_of.partition("\n")[0] not in shipped.splitlines():
            page = page.replace(section_of, "")
    return page


def test_the_page_is_up_to_date(page):
    shipped = PAGE.read_text(encoding="utf-8")
    assert without_new_methods(page, shipped) == shipped, "run python scripts/settings_doc.py"


def test_a_new_method_needs_no_new_page_and_a_changed_one_does(page):
    section_of = "### mine\n\nText.\n\n"
    assert without_new_methods(page.replace("## model\n", section_of + "## model\n"), page) == page
    changed = page.replace("### fedit\n", "### fedit\n\nMore.\n")
    assert without_new_methods(changed, page) != page


def test_every_setting_stands_in_its_group_with_its_mark(page):
    for name, _, _ in declared_settings():
        group, _, own = name.rpartition(".") if name.count(".") < 2 else name.partition(".")
        if name == "strategy":
            continue
        mark = " ↻" if name in resumable_settings() else ""
        assert f"| `{own}`{mark} |" in section(page, f"## {group or 'run'}"), name


@pytest.mark.parametrize("strategy", [file.stem for file in (CONF / "strategy").glob("*.yaml")])
def test_every_strategy_has_a_section_with_its_own_defaults(page, strategy):
    text = section(page, f"### {strategy}")
    assert "| `max_rank` | whole number ≥ 1 | that of `lora.max_rank` |" in text
    if strategy == "flexlora_change":  # the file's, not the class's
        assert "| `aggregation` | `state`, `change` | `change` |" in text


def test_values_defaults_and_descriptions_are_those_of_the_fields(page):
    client, dataset = section(page, "## client"), section(page, "## dataset")
    assert "| `batch_size` | whole number ≥ 1 | 32 | Examples per step. |" in client
    assert "| `holdout_fraction` | number ≥ 0, < 1 | 0.1 | Share of each client's data" in dataset
    assert "| `label_names` | list, or null | null | Names of the classes" in dataset
    assert "| `tiers[i].share` | number | required | Weight" in section(page, "## ranks")


def test_every_row_has_four_cells(page):
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) > 100
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}
    assert not [row for row in rows if re.search(r"\|\s+\|$", row)]


def test_descriptions_come_from_the_class_that_declares_a_field():
    @dataclasses.dataclass
    class Base:
        """Base.

        Parameters
        ----------
        first, second
            Both of them,
            in two lines.

        Raises
        ------
        third
            No field.
        """

    @dataclasses.dataclass
    class Derived(Base):
        """Derived.

        Parameters
        ----------
        fourth
            ``code`` and a | bar.

            A paragraph more.
        """

    assert descriptions(Derived) == {
        "first": "Both of them, in two lines.",
        "second": "Both of them, in two lines.",
        "fourth": r"`code` and a \| bar. A paragraph more.",
    }
