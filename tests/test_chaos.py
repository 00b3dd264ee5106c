"""Chaos runs: the schedule, what is noticed of it, kills, and the exit status."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from chaos_suite import suite
from chaos_suite.command import parse_command
from chaos_suite.faults import DRAWN, Kind, RandomFaults, SignFlippers, spoil
from chaos_suite.grid import read_journal
from chaos_suite.report import problems, tally
from chaos_suite.runs import Part, run_part, run_with_kills
from flwr.app import Message, MessageType, MetricRecord
from programs import run_program
from safetensors.torch import load_file

from hafl_app.config.compose import SettingsError
from hafl_app.engines.in_process import server_identity
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.server import reply_validation as judge
from hafl_app.wire.records import (
    METRICS,
    NUM_EXAMPLES,
    PLAN,
    AdapterArrays,
    adapter_content,
    plan_record,
    read_adapter,
)

pytestmark = pytest.mark.slow  # whole federations

TINY = (
    "experiment=chaos",
    "model=tiny_random",
    "model.num_layers=null",
    "dataset.num_train=240",
    "dataset.num_test=40",
    "federation.num_rounds=5",
)


def faults_of(schedule, rounds, attempt=0):
    return [kind for r in range(1, rounds + 1) for kind in schedule.of_round(r, attempt).values()]


class TestSchedule:
    def test_the_same_round_and_attempt_give_the_same_faults(self):
        rounds = [(r, a) for r in (3, 1, 17) for a in (0, 1)]
        first, second = (
            [RandomFaults(5, 0.3, 12).of_round(*which) for which in order]
            for order in (rounds, rounds[::-1])
        )
        assert first == second[::-1]
        assert len({str(faults) for faults in first}) == len(rounds)

    def test_another_seed_draws_others(self):
        assert RandomFaults(0, 0.3, 12).of_round(2, 0) != RandomFaults(1, 0.3, 12).of_round(2, 0)

    @pytest.mark.parametrize("bad", [0.0, 0.07, 0.1, 0.5, 1.0])
    def test_the_rate_is_exact(self, bad):
        assert len(faults_of(RandomFaults(3, bad, 12), 20)) == round(bad * 240)

    def test_all_kinds_come_equally_often(self):
        counts = Counter(faults_of(RandomFaults(0, 0.1, 12), 20))
        assert set(counts) == set(DRAWN)
        assert max(counts.values()) - min(counts.values()) <= 1

    def test_flippers_are_the_same_clients_in_every_round(self):
        schedule = SignFlippers(1, 0.2, 12)
        assert len(schedule.partitions) == 2
        for r in (1, 9):
            assert schedule.of_round(r, 0) == dict.fromkeys(schedule.partitions, Kind.SIGN_FLIPPED)


class TestSpoil:
    """A client holds components 0 to 3 of a (7, 5) weight, and trains 3 and 1."""

    PLAN = TrainPlan({"dense": ModulePlan((0, 1, 2, 3), (3, 1))})

    def exchange(self):
        draw = np.random.default_rng(0)

        def numbers(*shape):
            return draw.normal(size=shape).astype(np.float32)

        sent = AdapterArrays({"dense": (numbers(4, 5), numbers(7, 4))}, {"bias": numbers(3)})
        upload = AdapterArrays({"dense": (numbers(2, 5), numbers(7, 2))}, {"bias": numbers(3)})
        metrics = MetricRecord({NUM_EXAMPLES: 31})
        with server_identity():
            content = adapter_content(sent, **{PLAN: plan_record(self.PLAN)})
            request = Message(content, 4, MessageType.TRAIN)
            reply = Message(adapter_content(upload, **{METRICS: metrics}), reply_to=request)
        return request, reply, sent, upload

    @pytest.mark.parametrize(("kind", "factor"), [(Kind.SIGN_FLIPPED, -1), (Kind.SCALED, 1e6)])
    def test_the_change_of_what_was_trained_is_multiplied(self, kind, factor):
        request, reply, sent, upload = self.exchange()

        spoil(reply, request, kind)

        spoiled = read_adapter(reply.content)
        sent_A, sent_B = sent.modules["dense"]
        for got, new, old in (
            (spoiled.modules["dense"][0], upload.modules["dense"][0], sent_A[[3, 1]]),
            (spoiled.modules["dense"][1], upload.modules["dense"][1], sent_B[:, [3, 1]]),
            (spoiled.head["bias"], upload.head["bias"], sent.head["bias"]),
        ):
            assert got == pytest.approx(old + factor * (new - old), rel=1e-4, abs=1e-5)
        assert reply.content[METRICS][NUM_EXAMPLES] == 31

    @pytest.mark.parametrize("kind", [Kind.DROPPED, Kind.LATE, Kind.DUPLICATED])
    def test_faults_of_the_network_leave_the_content_as_it_is(self, kind):
        request, reply, _, upload = self.exchange()

        spoil(reply, request, kind)

        assert np.array_equal(
            read_adapter(reply.content).modules["dense"][0], upload.modules["dense"][0]
        )


def main(folder, *arguments):
    given = [*TINY, "kills=0", "flippers=0", "bad=0.25", *arguments, f"output_dir={folder}"]
    return run_program("scripts/chaos.py", *given)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a whole chaos run, and what the program said."""
    folder = tmp_path_factory.mktemp("chaos") / "out"
    return folder, main(folder)


@pytest.fixture(scope="module")
def quarter_bad(finished):
    """Return its run with a quarter of bad replies: 15 faults, every kind at least once."""
    folder, _ = finished
    return Part(folder / "faulty", (*TINY, "seed=0"), RandomFaults(0, 0.25, 12))


class TestNoticed:
    @pytest.mark.parametrize("kind", [kind for kind in DRAWN if kind.is_malformed])
    def test_every_malformed_kind(self, kind, quarter_bad):
        told = tally(read_journal(quarter_bad.folder))
        count = next(c for c in told.kinds if c.kind is kind)
        assert count.injected >= 1
        assert count.noticed == count.injected
        assert EXPECTED[kind] in count.reason

    def test_late_replies_are_turned_away_in_the_next_round(self, quarter_bad):
        told = tally(read_journal(quarter_bad.folder))
        stale = next(c for c in told.kinds if c.kind is Kind.STALE)
        assert stale.injected == stale.noticed >= 1

    def test_no_honest_reply_and_no_round_is_lost(self, quarter_bad):
        told = tally(read_journal(quarter_bad.folder))
        assert (told.honest_refused, told.rounds_lost) == (0, ())

    def test_rounds_that_must_be_repeated_are_reported(self, tmp_path):
        part = Part(
            tmp_path / "run",
            (*TINY, "federation.min_replies=12", "federation.max_retries=9"),
            RandomFaults(0, 0.1, 12),
        )
        # With every reply wanted, each fault costs its round a repeat, which may have one too.
        with pytest.raises(RuntimeError, match="round 1"):
            run_part(part)
        assert tally(read_journal(part.folder)).rounds_lost == (1,)


EXPECTED = {
    Kind.DROPPED: "no reply in time",
    Kind.LATE: "no reply in time",
    Kind.DUPLICATED: "a second reply",
    Kind.WRONG_SHAPES: "weight, expected",
    Kind.WRONG_RANKS: "rank",
    Kind.WRONG_NAMES: "modules: 1 missing",
    Kind.NAN: "not finite, the first is nan",
    Kind.INF: "not finite, the first is inf",
    Kind.NO_EXAMPLES: "num-examples is 0",
    Kind.MANY_EXAMPLES: "num-examples is 1000000000",
    Kind.SCALED: "change of",
    Kind.IMPORTANCE_INF: "importance: 1 of",
    Kind.IMPORTANCE_NEGATIVE: "importance of -1.0",
}


@pytest.mark.slow
def test_kills_do_not_change_the_result(quarter_bad, tmp_path):
    """Killed and resumed, the run repeats the schedule and ends with the same adapter."""
    killed = Part(
        tmp_path / "run",
        quarter_bad.overrides,
        quarter_bad.schedule,
        kill_rounds=(2, 4),
        round_seconds=0.5,
    )
    kills = run_with_kills(killed)

    assert [kill["round"] >= least for kill, least in zip(kills, (2, 4), strict=True)] == [True] * 2
    for name in ("adapter_model.safetensors", "head.safetensors"):
        whole, resumed = (load_file(p.folder / "adapter" / name) for p in (quarter_bad, killed))
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(tensor, resumed[key]) for key, tensor in whole.items())


class TestExitStatus:
    def test_is_0_if_all_is_noticed(self, finished):
        folder, done = finished
        assert done.returncode == 0

        found = json.loads((folder / "chaos.json").read_text())
        assert found["problems"] == []
        assert sum(c["injected"] for c in found["kinds"] if c["kind"] != Kind.STALE) == 15
        assert "| importance negative | 1 | 1 |" in done.stdout

    def test_is_1_if_a_fault_goes_unnoticed(self, finished, monkeypatch, tmp_path):
        def run(part):
            if part.folder.name == "fault-free":  # the same again
                shutil.copytree(finished[0] / "fault-free", part.folder)
            else:
                run_part(part)

        monkeypatch.setattr(suite, "run_part", run)
        monkeypatch.setattr(judge, "_check_scores", lambda update, plan: None)

        ended = main(tmp_path / "out")

        assert ended.returncode == 1

        unnoticed = json.loads((tmp_path / "out" / "chaos.json").read_text())["problems"]
        # An infinite score would still be rejected as an outlier of its round.
        assert [line.partition(":")[0] for line in unnoticed] == [Kind.IMPORTANCE_NEGATIVE]
        assert "error: importance negative: 1 of 1 unnoticed" in ended.stderr

    def test_rounds_lost_missing_kills_and_fallen_accuracy_are_problems(self):
        fine = {
            "bad": 0.1,
            "kinds": [{"kind": Kind.SIGN_FLIPPED, "injected": 2, "noticed": 0}],
            "rounds_lost": [],
            "attempts": [{"kind": "profile: x", "detected": True, "reason": "no"}],
            "kills": [{}],
            "kills_wanted": 1,
            "points": {"mean of last rounds": -0.9},
        }
        assert problems(fine) == []
        failed = [{"kind": "profile: x", "detected": False, "reason": ""}]
        assert problems({**fine, "attempts": failed}) == ["profile: x: not rejected"]
        assert "lost" in problems({**fine, "rounds_lost": [3]})[0]
        assert "0 of 1 kills" in problems({**fine, "kills": []})[0]
        assert "-1.10 points" in problems({**fine, "points": {"mean of last rounds": -1.1}})[0]
        assert problems({**fine, "bad": 0.2, "points": {"mean of last rounds": -9.0}}) == []


@pytest.mark.parametrize(
    "argument",
    ["bad=1.5", "bad=x", "kills=-1", "--seed", "resume=latest", "flippers=nan", "kills=2.5"],
)
def test_wrong_arguments_are_refused_in_one_line(argument):
    with pytest.raises(SettingsError, match=argument.split("=")[0]):
        parse_command([argument])
