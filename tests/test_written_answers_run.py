"""What the global adapter writes, through whole runs in process: watched, scored, by category."""

import math

import pytest
from running import instructions, records, run_tiny

from hafl_app.config.compose import SettingsError
from hafl_app.experiments.evaluation import score, table
from hafl_app.experiments.evaluation_request import read_request
from hafl_app.metrics import ACCURACY, PERPLEXITY, worst_tenth
from hafl_app.server.held_out_clients import draw_unseen
from hafl_app.tracking.details import DetailsFile

pytestmark = pytest.mark.slow

KINDS = ("how", "what", "when")
WATCHED = "federation.watch_prompts=['what is it\n#now','how?']"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    rows = [
        {"instruction": f"{KINDS[i % 3]} is {i % 7}", "input": "", "output": f"it is {i % 7}"}
        for i in range(90)
    ]
    for row in rows:
        row["kind"] = row["instruction"].split()[0]
    return (
        *instructions(tmp_path_factory.mktemp("pairs"), rows),
        "dataset.label_column=kind",
        "dataset.max_length=20",
        "dataset.holdout_fraction=0.3",
        "client.learning_rate=3e-2",
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("run") / "out"
    summary = run_tiny(
        folder,
        *pairs,
        WATCHED,
        "federation.watch_tokens=4",
        "federation.unseen_clients=1",
        "federation.generate_examples=5",
        "federation.generate_on_clients=2",
        "federation.generate_tokens=3",
    )
    return folder, summary


def answers_in(folder):
    return DetailsFile(folder).records("answers")


class TestWatchedPrompts:
    def test_are_answered_after_every_round_by_its_adapter(self, finished):
        folder, summary = finished
        kept = answers_in(folder)
        assert [one["server_round"] for one in kept] == [0, 1, 2]
        first, *_, last = ([one["answer"] for one in record["answers"]] for record in kept)
        assert first != last  # else the same adapter answered
        assert all(len(answer.split()) <= 4 for record in (first, last) for answer in record)
        assert summary["watched"] == {"prompts": 2}

    def test_stand_on_a_page_that_nothing_in_them_can_break(self, finished):
        folder, _ = finished
        page = (folder / "answers.md").read_text()
        assert page.count("## Prompt ") == 2
        assert all(page.count(f"- **round {number}**: ") == 2 for number in range(3))
        assert "\n#now" not in page

    def test_go_on_in_a_run_that_is_resumed(self, tmp_path, pairs):
        folder = tmp_path / "out"
        run_tiny(folder, *pairs, WATCHED, "federation.num_rounds=1")
        before = answers_in(folder)
        run_tiny(folder, *pairs, WATCHED, f"resume={folder}")
        assert [one["server_round"] for one in answers_in(folder)] == [0, 1, 2]
        assert answers_in(folder)[:2] == before
        assert (folder / "answers.md").read_text().count("- **round ") == 6

    def test_random_weights_are_not_watched_unasked(self, tmp_path, pairs):
        summary = run_tiny(tmp_path, *pairs, "federation.num_rounds=1")
        assert "watched" not in summary
        assert not (tmp_path / "answers.md").exists()

    def test_one_without_room_is_refused_before_anything_is_written(self, tmp_path, pairs):
        prompt = "far " * 30
        with pytest.raises(SettingsError, match=r"watch_prompts: 'far far .*leaves no room"):
            run_tiny(tmp_path / "out", *pairs, f"federation.watch_prompts=['{prompt}']")
        assert not [*tmp_path.glob("out/*.jsonl")]


class TestScores:
    def test_by_category_add_up_to_those_of_the_test_set(self, finished):
        _, summary = finished
        categories, final = summary["categories"], summary["final"]
        assert set(categories) <= set(KINDS)
        assert len(categories) > 1
        # Every answer has as many tokens, so that the mean over rows is the one over tokens.
        rows = sum(its["num_examples"] for its in categories.values())
        mean = sum(its["loss"] * its["num_examples"] for its in categories.values()) / rows
        assert mean == pytest.approx(final["test/loss"], rel=1e-5)
        for its in categories.values():
            assert its["perplexity"] == pytest.approx(math.exp(its["loss"]))
        assert sum(i["num_examples"] for i in summary["generation"]["by_category"].values()) == 5

    def test_of_clients_have_a_mean_and_a_worst_tenth(self, finished):
        folder, summary = finished
        scores = DetailsFile(folder).records("scores")
        last = [one["metrics"]["perplexity"] for one in scores if one["server_round"] == 2]
        its = summary["client_scores"]["perplexity"]
        assert summary["client_scores"]["clients"] == len(last) == 4
        assert its["worst_tenth"] == its["worst"] == max(last)
        assert its["best"] == min(last) < its["mean"] < its["worst"]
        assert its["mean"] == pytest.approx(sum(last) / 4)


class TestAnswersOfClients:
    def test_are_scored_where_they_are(self, finished):
        folder, summary = finished
        (unseen,) = draw_unseen(5, 1, seed=0)
        found = summary["client_generation"]
        assert [one["partition_id"] for one in found["unseen"]["by_client"]] == [unseen]
        seen = found["seen"]
        assert {one["partition_id"] for one in seen["by_client"]} == set(range(5)) - {unseen}
        assert seen["num_examples"] == 2 * 4
        shares = [one["rouge-l"] for one in seen["by_client"]]
        assert seen["rouge-l"] == pytest.approx(sum(shares) / 4)
        assert seen["worst_tenth"]["rouge-l"] == min(shares)
        # A few numbers each, and no text.
        assert summary["bytes"]["generate"]["up"] < 5 * 600
        assert not records(folder, "client")[-1]["error"]

    def test_none_are_asked_for_unasked(self, tmp_path, pairs):
        summary = run_tiny(tmp_path, *pairs, "federation.num_rounds=1")
        assert "client_generation" not in summary


class TestEvaluate:
    def test_client_by_client_scores_the_rows_that_each_held_out(self, finished):
        folder, _ = finished
        result = score(read_request([f"adapter={folder}/adapter", "by=client"]))
        each = result["clients"]["by_client"]
        assert [one["partition_id"] for one in each] == [0, 1, 2, 3, 4]
        assert result["scored"] == sum(one["num_examples"] for one in each) < 90 // 2
        values = [one["perplexity"] for one in each]
        spread = result["clients"]["spread"]["perplexity"]
        assert spread["worst_tenth"] == max(values) > spread["mean"] > min(values)
        lines = table(result).splitlines()
        assert any(line.startswith("worst tenth ") for line in lines)
        assert sum(line.startswith("  client ") for line in lines) == 5

    def test_categories_are_shown_with_their_rows(self, finished, pairs):
        folder, summary = finished
        data = [one for one in pairs if one.startswith("dataset")]
        more = ["metrics=loss,exact-match", "max_new_tokens=3"]
        result = score(read_request([f"adapter={folder}/adapter", *data, *more]))
        for name, its in summary["categories"].items():
            assert result["categories"][name]["perplexity"] == pytest.approx(its["perplexity"])
            assert "exact-match" in result["categories"][name]
            assert f"  {name} " in table(result)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["by=rank"], "by=rank: expected client"),
            (["by=client", "seed=3"], "seed=: by=client scores the rows that each client"),
            (["by=client", "dataset.data_seed=3"], "dataset.data_seed=: by=client scores"),
            (["by=client", "tasks=arc"], "tasks have no clients"),
        ],
    )
    def test_what_would_score_other_rows_is_refused(self, finished, arguments, message):
        with pytest.raises(SettingsError, match=message) as caught:
            read_request([f"adapter={finished[0]}/adapter", *arguments])
        assert "\n" not in str(caught.value)

    def test_an_adapter_without_its_run_has_no_clients(self, tmp_path):
        with pytest.raises(SettingsError, match="is in no run's folder"):
            read_request([f"adapter={tmp_path}/adapter", "by=client"])


def test_the_worst_tenth_is_at_least_one_client():
    assert worst_tenth([0.5, 0.1, 0.9], ACCURACY) == 0.1
    assert worst_tenth([3.0, 9.0, 2.0], PERPLEXITY) == 9.0
    assert worst_tenth([i / 11 for i in range(11)], ACCURACY) == pytest.approx(0.5 / 11)
    assert math.isnan(worst_tenth([], ACCURACY))
