"""Requests that come in threads are answered in groups, and none waits for what cannot come."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from hafl_app.client.gathering import Gathering

PAUSE = 0.05


class Answers:
    """Note the groups that were answered; `lone` are the requests that no group takes."""

    def __init__(self, size=4, pause_s=PAUSE, lone=()):
        self.groups, self.lone = [], lone
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()
        self.gathering = Gathering(self.together, self.alone, lambda: size, pause_s)

    def together(self, requests):
        self.begun.set()
        self.go_on.wait()
        self.groups.append(sorted(requests))
        if "broken" in requests:
            raise RuntimeError("a broken kernel")
        return [None if r in self.lone else f"joint {r}" for r in requests]

    def alone(self, request):
        self.groups.append([request])
        if request == "unfit":
            raise ValueError("no such row")
        return f"alone {request}"

    def ask(self, requests, in_company=True):
        """Ask from as many threads at once; return the replies or errors in order."""

        def one(request):
            try:
                return self.gathering.answer(request, in_company=in_company)
            except ValueError as error:
                return error

        with ThreadPoolExecutor(max(1, len(requests))) as threads:
            return list(threads.map(one, requests))


def test_a_full_group_does_not_wait():
    answers = Answers(size=3, pause_s=60)
    assert answers.ask("abc") == ["joint a", "joint b", "joint c"]
    assert answers.groups == [["a", "b", "c"]]
    assert answers.gathering.largest == 3


def test_what_is_left_of_a_round_goes_on_without_others():
    answers = Answers(size=3)
    assert answers.ask("abcde") == [f"joint {letter}" for letter in "abcde"]
    assert sorted(map(len, answers.groups)) == [2, 3]


def test_one_that_nobody_joins_is_answered_alone():
    answers = Answers()
    assert answers.ask("a") == ["alone a"]


def test_what_wants_no_company_does_not_wait_for_any():
    answers = Answers(pause_s=60)
    started = time.monotonic()
    assert answers.ask("ab", in_company=False) == ["alone a", "alone b"]
    assert time.monotonic() - started < 30


def test_those_who_come_during_an_answer_are_the_next_group():
    answers = Answers(size=2, pause_s=60)
    answers.go_on.clear()
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(answers.ask, "ab")
        answers.begun.wait()
        second = ThreadPoolExecutor(1).submit(answers.ask, "cd")
        answers.go_on.set()
        assert first.result() == ["joint a", "joint b"]
    assert second.result() == ["joint c", "joint d"]
    assert answers.groups == [["a", "b"], ["c", "d"]]


def test_who_falls_out_is_answered_alone_and_the_others_are_not_touched():
    answers = Answers(size=3, lone=("b", "unfit"))
    a, b, unfit = answers.ask(["a", "b", "unfit"])
    assert (a, b) == ("joint a", "alone b")
    assert isinstance(unfit, ValueError)
    assert answers.gathering.largest == 1


def test_a_group_that_fails_is_answered_one_at_a_time_and_the_next_one_as_ever():
    answers = Answers(size=2, pause_s=60)
    assert answers.ask(["a", "broken"]) == ["alone a", "alone broken"]
    assert answers.ask("cd") == ["joint c", "joint d"]


def test_a_group_of_one_waits_for_nobody():
    answers = Answers(size=1, pause_s=60)
    assert answers.ask("ab") == ["alone a", "alone b"]
