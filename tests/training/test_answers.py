import logging
from decimal import Decimal

import pytest

from hafl_app import packages
from hafl_app.packages import MissingPackageError
from hafl_app.training.answers import (
    GenerationScores,
    final_number,
    is_exact,
    rouge_l,
    score_answers,
)


class TestFinalNumber:
    @pytest.mark.parametrize(
        ("text", "number"),
        [
            ("#### 42", "42"),
            ("She makes 9 * 2 = $<<9*2=18>>18 a day.\n#### 18", "18"),
            ("#### 1,234,567", "1234567"),
            ("#### $5.50", "5.5"),
            ("#### 42.", "42"),
            ("#### 42.0", "42"),
            ("#### -3", "-3"),
            ("#### -$3", "-3"),
            ("#### $-3", "-3"),
            ("#### \u22127", "-7"),
            ("#### .5", "0.5"),
            ("####7", "7"),
            ("#### 60%", "60"),
            ("#### 10 dollars\n#### 11", "10"),
            ("#### the answer is 12 eggs, 3 a day", "12"),
            ("so that leaves 16-3 = 13. The answer is 13.", "13"),
            ("it is 9-4", "4"),
            ("12 of them, at 3 each", "3"),
            ("1,23 is no number of thousands", "23"),
        ],
    )
    def test_is_read_however_it_is_written(self, text, number):
        assert final_number(text) == Decimal(number)

    @pytest.mark.parametrize("text", ["", "no idea.", "7 eggs\n#### none", "#### $"])
    def test_is_absent(self, text):
        assert final_number(text) is None


class TestExactMatch:
    @pytest.mark.parametrize("answer", ["#### 1,080", "$1080.00", "so it is 1080."])
    def test_numbers_are_compared_as_numbers(self, answer):
        assert is_exact(answer, "12 * 90\n#### 1080")

    @pytest.mark.parametrize("answer", ["#### 108", "#### -1080", "", "1080 or 12"])
    def test_another_number_is_wrong(self, answer):
        assert not is_exact(answer, "12 * 90\n#### 1080")

    def test_without_a_number_behind_the_marker_nothing_is_right(self):
        assert not is_exact("####", "####")

    def test_words_are_compared_whatever_their_case_and_punctuation(self):
        assert is_exact(" the cat,  sat", "The cat sat.")
        assert not is_exact("the cat sat down", "The cat sat.")
        assert not is_exact("7", "the 7")  # no marker: words, not numbers


class TestRougeL:
    def test_is_the_f1_of_the_longest_common_subsequence(self):
        # common: police the gunman (3); of 4 and of 6 words: P = 3/4, R = 3/6, F1 = 0.6
        scores = rouge_l(["police kill the gunman"], ["the police ended the gunman today"])
        assert scores == pytest.approx([0.6])

    def test_is_of_each_answer_and_stems_words(self):
        # 1 by stems ("jumped" and "jumps"), 0, and 2/3: one of one word, one of two
        scores = rouge_l(["jumped", "", "yes"], ["jumps", "nothing", "yes sir"])
        assert scores == pytest.approx([1, 0, 2 / 3])

    def test_leaves_the_programs_log_as_it_is(self, monkeypatch):
        monkeypatch.setattr(logging.root, "handlers", [])
        rouge_l(["a"], ["a"])
        assert logging.root.handlers == []

    def test_without_its_package_is_refused_in_one_line(self, monkeypatch):
        monkeypatch.setattr(packages.importlib.util, "find_spec", lambda _: None)
        with pytest.raises(MissingPackageError, match=r"pip install .*rouge-score") as caught:
            score_answers(["a"], ["a"])
        assert "\n" not in str(caught.value)


class TestScores:
    def test_are_shares_of_all_answers(self):
        scores = score_answers(["#### 4", "4", "#### 5"], ["#### 4", "#### 4", "#### 4"], 2)
        assert scores.exact_match == pytest.approx(2 / 3)
        assert scores.to_json()["num_examples"] == 3
        assert scores.to_json()["left_out"] == 2

    def test_as_many_references_as_answers(self):
        with pytest.raises(ValueError, match="2 answers for 1"):
            score_answers(["a", "b"], ["a"])

    def test_of_each_category_are_those_of_its_answers(self):
        answers, references = ["a", "b", "c", "a b"], ["a", "x", "c", "a"]
        scores = score_answers(answers, references, categories=["odd", "even", "odd", "even"])

        assert list(scores.by_category) == ["even", "odd"]
        assert scores.by_category["odd"] == GenerationScores(1.0, 1.0, 2)
        assert scores.by_category["even"] == GenerationScores(pytest.approx(1 / 3), 0.0, 2)
        assert scores.categories()["odd"] == {"rouge-l": 1.0, "exact-match": 1.0, "num_examples": 2}
        assert scores.rouge_l == pytest.approx((1 + 0 + 1 + 2 / 3) / 4)

    def test_without_categories_there_are_none(self):
        assert score_answers(["a"], ["a"]).categories() == {}
