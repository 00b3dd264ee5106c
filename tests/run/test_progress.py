"""Where a run stands: the time left of all of it, what is written, and how often it is said."""

import json

import pytest
from running import TINY

from hafl_app.config.compose import compose
from hafl_app.run import build
from hafl_app.run.progress import PROGRESS_FILE, Progress, progress_line, read_progress
from hafl_app.run.workload import TRAINED, CentralRows, Step, client_texts, steps_of
from hafl_app.wire.node_profile import NodeProfile

ROWS = CentralRows(validation=10, test=40)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def profiles(sizes=(10, 20, 30)):
    return [
        NodeProfile(i, len(sizes), rank=2 * (i + 1), num_examples=n, device="cpu", node_id=11 + i)
        for i, n in enumerate(sizes)
    ]


def steps(*overrides, rows=ROWS, held_out=frozenset()):
    settings = compose([*TINY, "dataset.holdout_fraction=0.5", *overrides])
    options = build.run_options(settings)
    return steps_of(settings, options, profiles(), held_out, rows)


def texts_of(found, stage):
    return {step.server_round: step.texts for step in found if step.stage == stage}


class TestSteps:
    def test_a_round_is_what_its_clients_train_and_score(self):
        found = steps()

        assert texts_of(found, "train") == {1: 60 * TRAINED, 2: 60 * TRAINED}
        assert texts_of(found, "evaluate") == {1: 60, 2: 60}  # as many held out as trained on
        assert texts_of(found, "score") == {0: 10, 1: 10, 2: 50}
        assert texts_of(found, "finish") == {3: 40}  # the best round on the test data

    @pytest.mark.parametrize(
        ("overrides", "stage", "expected"),
        [
            (["federation.fraction_train=0.5"], "train", {1: 30 * TRAINED, 2: 30 * TRAINED}),
            (["client.local_epochs=3"], "train", {1: 180 * TRAINED, 2: 180 * TRAINED}),
            # 16 texts a batch: 10, 16 and 16 of them
            (["client.max_steps=1"], "train", {1: 42 * TRAINED, 2: 42 * TRAINED}),
            (["federation.evaluate_every=2"], "evaluate", {2: 60}),
            (["federation.fraction_evaluate=0"], "evaluate", {}),
            (["federation.test_every=1"], "score", {0: 50, 1: 50, 2: 50}),
            # every rank alone, twice as many rounds of it
            (["federation.alone_clients_per_rank=1"], "alone", {3: 120 * TRAINED}),
            # three lone adapters, two ranks below the largest, the best round
            (["federation.alone_clients_per_rank=1"], "finish", {3: 6 * 40}),
        ],
    )
    def test_settings_count(self, overrides, stage, expected):
        assert texts_of(steps(*overrides), stage) == pytest.approx(expected)

    def test_held_out_clients_come_after_the_rounds(self):
        found = steps(held_out=frozenset({2}))

        assert texts_of(found, "unseen") == {3: 30}
        assert texts_of(found, "train") == {1: 30 * TRAINED, 2: 30 * TRAINED}

    def test_written_answers_cost_their_tokens(self):
        written = ["model=tiny_random_causal", "dataset=local", "dataset.answer_column=a"]
        written += ["federation.generate_on_clients=5", "federation.generate_tokens=8"]
        written += ["federation.watch_prompts=[a,b]", "federation.watch_tokens=4"]
        found = steps(*written, held_out=frozenset({2}))

        assert texts_of(found, "generate") == {3: 3 * 5 * (1 + 8 / 4)}  # the unseen one too
        assert texts_of(found, "score")[1] == pytest.approx(10 + 2 * (1 + 4 / 4))

    def test_a_server_without_data_trains_nobody_alone(self):
        found = steps("federation.alone_clients_per_rank=1", rows=CentralRows(0, 0))

        assert texts_of(found, "alone") == {}
        assert sum(texts_of(found, "score").values()) == 0


class TestTimeLeft:
    """A run of two rounds whose texts take 1 s each, and half as long when they are scored."""

    PLAN = (
        Step("score", 0, 10),
        Step("train", 1, 60, 30),
        Step("score", 1, 10),
        Step("train", 2, 60, 30),
        Step("score", 2, 50),
        Step("alone", 3, 120, 60),
        Step("finish", 3, 40),
    )
    TEXTS = {11: 10.0, 12: 20.0, 13: 30.0}  # noqa: RUF012

    @pytest.fixture
    def progress(self, tmp_path, clock):
        progress = Progress(tmp_path, None, clock)
        progress.plan(self.PLAN, self.TEXTS)
        return progress

    def score(self, progress, clock, number, seconds):
        progress.begin("score", number)
        clock.now += seconds
        progress.end()

    def train(self, progress, clock, number):
        progress.begin("train", number)
        progress.asked([11, 12, 13])
        for node, seconds in ((11, 10), (12, 20), (13, 30)):
            clock.now += seconds
            progress.trained(seconds)
            progress.answered(node)

    def test_is_unknown_before_a_client_has_trained(self, progress, clock):
        self.score(progress, clock, 0, 5.0)
        assert progress.seconds_left() is None

    def test_one_scoring_that_loaded_the_model_costs_no_more_than_training(self, progress, clock):
        self.score(progress, clock, 0, 500.0)
        self.train(progress, clock, 1)

        # 60 trained and 120 alone at 1 s, and 100 scored at no more than that
        assert progress.seconds_left() == pytest.approx(180 + 60 + 40)

    def test_is_that_of_the_whole_run(self, progress, clock):
        self.score(progress, clock, 0, 5.0)
        self.train(progress, clock, 1)

        # The rest by what texts cost: 60 trained and 120 alone at 1 s, 100 scored at 0.5 s.
        assert progress.seconds_left() == pytest.approx(180 + 50)

    def test_goes_down_within_a_round(self, progress, clock):
        self.score(progress, clock, 0, 5.0)
        self.train(progress, clock, 1)
        self.score(progress, clock, 1, 5.0)
        progress.begin("train", 2)
        progress.asked([11, 12, 13])
        before = progress.seconds_left()
        clock.now += 10
        waiting = progress.seconds_left()
        progress.answered(11)

        assert before == pytest.approx(60 + 25 + 120 + 20)
        assert waiting == pytest.approx(before - 10)
        assert progress.seconds_left() == pytest.approx(before - 10)

    def test_a_first_step_that_loaded_the_model_does_not_count_for_long(self, progress, clock):
        self.score(progress, clock, 0, 500.0)
        self.train(progress, clock, 1)
        self.score(progress, clock, 1, 5.0)

        assert progress.seconds_left() == pytest.approx(60 + 25 + 120 + 20)

    def test_a_lone_client_keeps_one_trainer_busy(self, progress, clock):
        self.score(progress, clock, 0, 5.0)
        progress.begin("train", 1)
        progress.asked([11, 12, 13])
        clock.now += 20  # the three at once: 60 s of training in 20 s
        for node in (11, 12, 13):
            progress.trained(20.0)
            progress.answered(node)
        progress.begin("score", 1)
        clock.now += 5
        progress.end()

        # 1 s a text for one alone: the longest of the lone clients takes 60 s, not 40
        assert progress.seconds_left() == pytest.approx(20 + 25 + 60 + 20)

    def test_a_resumed_run_has_the_rest_alone(self, progress, clock):
        self.train(progress, clock, 2)

        assert progress.seconds_left() == pytest.approx(50 + 120 + 40)  # nothing scored yet

    def test_a_repeated_round_is_the_same_step(self, progress, clock):
        self.score(progress, clock, 0, 5.0)
        self.train(progress, clock, 1)
        left = progress.seconds_left()
        self.train(progress, clock, 1)

        assert progress.seconds_left() == pytest.approx(left)

    def test_stages_add_up(self, progress, clock):
        self.score(progress, clock, 0, 5.0)
        self.train(progress, clock, 1)
        self.score(progress, clock, 1, 7.0)

        assert progress.seconds == {"score": 12.0, "train": 60.0}


class TestWhereItIsShown:
    @pytest.fixture
    def said(self):
        return []

    def test_no_more_than_a_line_in_half_a_minute(self, tmp_path, clock, said):
        progress = Progress(tmp_path, said.append, clock)
        progress.plan([Step("train", 1, 600, 1), Step("score", 1, 1)], {})
        progress.begin("train", 1)
        progress.asked(range(600))
        for node in range(600):
            clock.now += 0.5  # 300 s in all
            progress.answered(node)

        assert len(said) == 10
        assert said[0] == "round 1/1, training, 60 of 600 clients, ETA 4m30s"

    def test_a_line_of_the_round_puts_off_the_next(self, tmp_path, clock, said):
        progress = Progress(tmp_path, said.append, clock)
        progress.begin("train", 1)
        for _ in range(100):
            clock.now += 10
            progress.was_printed()
            progress.answered(1)

        assert said == []

    def test_the_file_says_it_and_goes_away(self, tmp_path, clock):
        progress = Progress(tmp_path, None, clock)
        progress.plan([Step("train", 3, 60, 30), Step("score", 3, 1)], {11: 60.0})
        progress.begin("train", 3)
        progress.asked([11])
        clock.now += 1
        progress.answered(11)

        state = read_progress(tmp_path)
        assert (state["stage"], state["round"], state["rounds"]) == ("train", 3, 3)
        assert (state["done"], state["asked"]) == (1, 1)

        progress.close()
        assert read_progress(tmp_path) is None
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_is_not_there_is_no_error(self, tmp_path, clock):
        progress = Progress(tmp_path / "none", None, clock)
        progress.begin("train", 1)
        progress.close()

        assert read_progress(tmp_path / "none") is None

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"stage": "train"}', "\0"])
    def test_a_damaged_file_says_nothing(self, tmp_path, text):
        (tmp_path / PROGRESS_FILE).write_text(text)

        assert read_progress(tmp_path) is None

    def test_the_longest_line_fits(self):
        state = {
            "stage": "alone", "round": 999, "rounds": 1000, "done": 99_999, "asked": 100_000,
            "seconds_left": 1e6,
        }  # fmt: skip

        assert len(progress_line(state)) <= 80
        assert json.loads(json.dumps(state)) == state


def test_more_steps_than_examples_are_not_taken():
    settings = compose([*TINY, "client.max_steps=1000"])

    assert client_texts(settings, 10) == 10 * TRAINED
