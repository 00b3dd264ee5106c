"""Tables of what language models write."""

import json

import pytest
from written_runs import write_run

from hafl_app.reports.content import report_on
from hafl_app.tracking.details import DETAILS_FILE, answers_record


def write(folder, summary=None, answers=(), **settings):
    write_run(folder, (40.0, 20.0), metric="perplexity", clients=(9.0, 8.0, 7.0, 6.0), **settings)
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (summary or {})))
    with (folder / DETAILS_FILE).open("a") as file:
        for number, answer in enumerate(answers):
            one = {"prompt": "why|?\n", "expected": "", "category": "", "answer": answer}
            file.write(json.dumps(answers_record(number, [one])) + "\n")


def tables(folder):
    (chapter,) = report_on([folder]).chapters
    return {table.title: table for table in chapter.tables}


@pytest.fixture
def two_seeds(tmp_path):
    for seed, value in enumerate((10.0, 14.0)):
        its = {"perplexity": value, "num_examples": 5}
        scores = {"rouge-l": 0.1 * (1 + seed), "exact-match": 0.0}
        summary = {
            "categories": {"qa": its, "chat": {"perplexity": None, "num_examples": 2}},
            "client_generation": {"seen": {**scores, "worst_tenth": scores}},
        }
        write(tmp_path / f"seed{seed}", summary, ["base", f"after {seed}"], seed=seed)
    return tables(tmp_path)


def test_categories_have_a_spread_over_seeds(two_seeds):
    qa, chat = two_seeds["Test perplexity by category"].rows
    assert qa[1:] == ["qa", "5", "2", "12.00 ± 2.83"]
    assert chat[1:] == ["chat", "2", "2", "-"]  # infinite: null in the file


def test_answers_of_clients_are_in_percent(two_seeds):
    (row,) = two_seeds["Answers of clients"].rows
    assert row[1:4] == ["seen", "2", "15.0 ± 7.1"]


def test_watched_answers_are_those_before_and_after(two_seeds):
    before, after = two_seeds["Answers"].rows
    assert before == ("why|?", "all", "0", "base")
    assert (after[2], after[3]) == ("1", "after 0")  # the first seed's
    assert "why\\|?" in two_seeds["Answers"].markdown()


def test_runs_without_any_have_no_such_table(tmp_path):
    write(tmp_path / "one")
    assert not {"Answers", "Answers of clients", "Test perplexity by category"} & set(
        tables(tmp_path)
    )


@pytest.mark.parametrize("categories", [[1], {"qa": 3}, "text"])
def test_a_foreign_summary_makes_no_traceback(tmp_path, categories):
    write(tmp_path / "one", {"categories": categories, "client_generation": {"seen": 1}})
    assert tables(tmp_path)
