"""`scripts/evaluate.py`: saved adapters, and base models alone, scored by themselves."""

import json
import math
import shutil
import sys
import types
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from programs import run_program
from running import TINY, records, run_tiny
from transformers import AutoTokenizer

from hafl_app import packages
from hafl_app.config.compose import SettingsError
from hafl_app.data.errors import DataError
from hafl_app.experiments import evaluation, harness, scored_rows
from hafl_app.experiments.evaluation import score, table
from hafl_app.experiments.evaluation_request import read_request
from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.packages import MissingPackageError
from hafl_app.training.adapter_card import SavedAdapterError
from hafl_app.training.causal import CausalSpec
from hafl_app.training.settings import BaseSpec

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
STORIES = ROOT.parent / "shared" / "models" / "stories260k"
SMALL = ("federation.num_rounds=1", "federation.test_every=1")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[str, ...]:
    """Return a data set of 60 prompts, of which every tenth leaves no room for an answer."""
    file = tmp_path_factory.mktemp("data") / "mine.jsonl"
    rows = [
        {
            "instruction": f"what is {i % 7}" + " now" * (30 * (i % 10 == 0)),
            "input": "",
            "output": f"it is\n#### {i % 7}",
        }
        for i in range(60)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return ("dataset=instructions", f"dataset.path={file}", "dataset.max_length=20")


@pytest.fixture(scope="module")
def causal(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("run") / "causal"
    return folder, run_tiny(folder, *SMALL, "model=tiny_random_causal", *data)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "classifier"
    return folder, run_tiny(folder, *SMALL)


def scored(*arguments: str):
    return score(read_request(arguments))


class TestScore:
    def test_a_causal_adapter_scores_what_its_run_did(self, causal, data):
        folder, summary = causal
        result = scored(f"adapter={folder}/adapter", *data)
        final = summary["final"]
        assert result["metrics"]["perplexity"] == pytest.approx(final["test/perplexity"], rel=1e-6)
        assert result["round"] == 1
        assert result["rows"] == 6
        assert result["scored"] < 6  # some leave no room

    def test_so_does_a_classifier(self, classifier):
        folder, summary = classifier
        settings = [o for o in TINY if o.startswith("dataset")]
        result = scored(f"adapter={folder}/adapter", *settings)
        assert result["metrics"]["accuracy"] == summary["final"]["test/accuracy"]
        assert result["metrics"]["loss"] == pytest.approx(summary["final"]["test/loss"], rel=1e-5)
        assert result["scored"] == result["rows"] == 40
        assert result["left_out"] == {}

    def test_so_does_a_classifier_of_images(self, tmp_path):
        images = ("dataset=digits", "dataset.max_examples=60", "dataset.max_test_examples=30")
        final = run_tiny(tmp_path, *SMALL, "model=vit_digits_random", *images)["final"]
        result = scored(f"adapter={tmp_path}/adapter", *images)
        assert result["metrics"]["accuracy"] == final["test/accuracy"]
        assert result["metrics"]["loss"] == pytest.approx(final["test/loss"], rel=1e-5)

    def test_the_base_alone_scores_what_the_untrained_model_did(self, causal, data):
        folder, _ = causal
        first = records(folder, "round")[0]["metrics"]
        result = scored("adapter=none", "model=tiny_random_causal", *data)
        assert result["metrics"]["perplexity"] == pytest.approx(first["test/perplexity"], rel=1e-5)
        assert result["round"] is None

    def test_rows_are_cut_as_in_training_unless_said_otherwise(self, causal, data):
        folder, _ = causal
        own = [o for o in data if "max_length" not in o]
        assert scored(f"adapter={folder}/adapter", *own)["max_length"] == 20
        longer = scored(f"adapter={folder}/adapter", *own, "dataset.max_length=60")
        assert (longer["max_length"], longer["scored"]) == (60, 6)

    def test_generated_answers_are_scored_where_they_are_asked_for(self, causal, data, monkeypatch):
        folder, _ = causal
        given = []
        real = scored_rows.score_generation

        def score_generation(model, base, prompts, references, options, categories):
            given.append((prompts, references, options))
            return real(model, base, prompts, references, options, categories)

        monkeypatch.setattr(scored_rows, "score_generation", score_generation)
        adapter = f"adapter={folder}/adapter"
        plain = scored(adapter, *data)
        both = scored(adapter, *data, "metrics=loss,rouge-l,exact-match", "max_new_tokens=3")
        one = scored(adapter, *data, "metrics=exact-match", "max_examples=2")

        assert not {"rouge-l", "exact-match"} & set(plain["metrics"])
        assert set(both["metrics"]) == {*plain["metrics"], "rouge-l", "exact-match"}
        assert set(one["metrics"]) == {"exact-match"}
        assert one["rows"] == 2
        (drawn, count), *_ = one["left_out"].items()
        assert ("max_examples" in drawn, count) == (True, 4)
        assert one["scored"] == one["generated"]
        (prompts, references, options), _ = given
        assert len(prompts) == 6
        assert all(reference.startswith("it is\n#### ") for reference in references)
        assert (options.max_new_tokens, options.max_length) == (3, 20)

    def test_the_result_is_written_and_shown(self, causal, data, tmp_path):
        folder, _ = causal
        file = tmp_path / "new" / "result.json"
        result = scored(f"adapter={folder}/adapter", *data, f"output={file}")
        assert json.loads(file.read_text()) == result
        lines = table(result).splitlines()
        assert f"test data       local, {result['scored']} of 6 rows" in lines
        without = 6 - result["scored"]
        assert f"left out        {without}: no room for an answer within 20 tokens" in "\n".join(
            lines
        )
        assert sum(result["left_out"].values()) == without > 0
        assert f"perplexity      {result['metrics']['perplexity']:.2f}" in lines
        assert lines[0].endswith("round 1")


@pytest.mark.parametrize(
    ("base", "is_random", "line"),
    [
        ("some/base", False, "some/base"),
        ("some/base", True, "some/base, random weights"),
        ("", True, "random weights"),
        ("a\n\x1b[2Jb", False, "a \\x1b[2Jb"),
    ],
)
def test_the_table_says_what_the_base_is(base, is_random, line):
    found = {"adapter": "a\nb", "round": 3, "base": base, "random_weights": is_random}
    found |= {"dataset": "d", "scored": 9, "rows": 20, "metrics": {"loss": 1.0}, "left_out": {}}

    lines = table(found).splitlines()

    assert lines[:2] == ["adapter     a b, round 3", f"base model  {line}"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["dataset=synthetic"], "adapter= must be given"),
            (["adapter=none"], "needs model="),
            (["adapter=x", "metrics=rougel"], "none of loss, rouge-l, exact-match; did you mean"),
            (["adapter=x", "max_examples=0"], "max_examples=0: expected a whole number"),
            (["adapter=x", "max_new_tokens=few"], "max_new_tokens=few"),
            (["adapter=x", "max_new_tokens=5"], "max_new_tokens=5: of generated answers, add"),
            (["adapter=x", "metrics="], "metrics=: expected a value"),
            (["adapter=x", "output="], "output=: expected a value"),
            (["adapter=x", "adapter=y"], "adapter=: given 2 times"),
            (["adapter=x", "output=/"], "output=/: expected a file, it is a folder"),
            (["adapter=x", f"output={__file__}/a"], f"{__file__} is a file, expected a folder"),
            (["adapter=x", "output_dir=y"], "output_dir=: of a run; output=FILE"),
            (["adapter=x", "resume=y"], "resume=: of a run; output=FILE"),
            (["adapter=x", "dataset.pth=y"], "dataset.pth"),
            (["adapter=none", "model=tiny_random"], "can be scored alone"),
        ],
    )
    def test_a_mistake_is_one_line(self, arguments, message):
        with pytest.raises(SettingsError, match=message) as caught:
            scored(*arguments)
        assert "\n" not in str(caught.value)

    def test_no_adapter_there(self, tmp_path):
        with pytest.raises(SavedAdapterError, match="not a saved adapter"):
            scored(f"adapter={tmp_path}")

    def test_a_model_and_data_of_different_tasks(self, causal, classifier, data):
        with pytest.raises(SettingsError, match="needs prompts with answers"):
            scored(f"adapter={causal[0]}/adapter", "dataset=synthetic")
        with pytest.raises(SettingsError, match="needs labeled text"):
            scored(f"adapter={classifier[0]}/adapter", *data)
        with pytest.raises(SettingsError, match="exact-match: for a causal_lm only"):
            scored(f"adapter={classifier[0]}/adapter", "metrics=exact-match")

    def test_classes_that_the_adapter_does_not_know(self, classifier, tmp_path):
        file = tmp_path / "mine.csv"
        file.write_text("text,label\n" + "\n".join(f"word {i},odd{i % 2}" for i in range(40)))
        with pytest.raises(DataError, match="not among the 20 label names"):
            scored(f"adapter={classifier[0]}/adapter", "dataset=local", f"dataset.path={file}")

    @pytest.mark.parametrize("setting", ["model=minilm", "model.quantization=nf4"])
    def test_an_adapter_takes_no_other_base_model(self, setting):
        with pytest.raises(SettingsError, match="only adapter=none takes another"):
            read_request(["adapter=x", setting])
        read_request(["adapter=x", "model.trust_remote_code=true"])

    def test_blockwise_is_no_precision_of_a_base_alone(self, data):
        with pytest.raises(SettingsError, match="each client's own choice"):
            scored(
                *("adapter=none", "model=tiny_random_causal", "model.quantization=blockwise"), *data
            )

    def test_rouge_without_its_package(self, monkeypatch):
        monkeypatch.setattr(packages.importlib.util, "find_spec", lambda _: None)
        with pytest.raises(MissingPackageError, match=r"pip install .*rouge-score"):
            read_request(["adapter=x", "metrics=rouge-l"])
        read_request(["adapter=x", "metrics=loss,exact-match"])


class TestHarness:
    @pytest.fixture
    def lm_eval(self, monkeypatch):
        """Play the package: what would be run is kept."""
        asked = {}

        def simple_evaluate(**options):
            asked.update(options)
            return {"results": {"arc": {"acc,none": 0.25}}}

        class TaskManager:
            task_index: ClassVar = {"arc": None, "arc_easy": None}

        package = types.ModuleType("lm_eval")
        tasks = types.ModuleType("lm_eval.tasks")
        tasks.TaskManager = TaskManager
        models = types.ModuleType("lm_eval.models")
        huggingface = types.ModuleType("lm_eval.models.huggingface")
        package.simple_evaluate = simple_evaluate
        huggingface.HFLM = lambda **options: options
        for module in (package, models, huggingface, tasks):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        found = types.SimpleNamespace(origin="lm_eval/__init__.py")
        monkeypatch.setattr(packages.importlib.util, "find_spec", lambda _: found)
        monkeypatch.setattr(harness, "hub_tokenizer", lambda base: f"tokenizer of {base.path}")
        harness._task_manager.cache_clear()
        yield asked
        harness._task_manager.cache_clear()

    @pytest.mark.parametrize("task", ["arc_eazy", "/nowhere/arc_eazy.yaml"])
    def test_a_task_that_is_not_there_is_refused_before_anything_is_loaded(
        self, data, lm_eval, task
    ):
        with pytest.raises(SettingsError) as caught:
            scored("adapter=/nowhere", *data, f"tasks=arc,{task}")
        assert str(caught.value).startswith(f"tasks={task}: neither a task of lm-eval nor a YAML")
        assert ("did you mean 'arc_easy'" in str(caught.value)) == (task == "arc_eazy")

    def test_runs_on_the_adapted_model(self, causal, data, lm_eval, monkeypatch):
        model = evaluation.load_adapter(causal[0] / "adapter").model
        base = evaluation.read_adapter(causal[0] / "adapter").spec.base
        named = evaluation.replace(base, random_weights=False, path="who/model")

        results = harness.run_tasks(model, named, ["arc"], 7)

        assert results == {"arc": {"acc,none": 0.25}}
        assert lm_eval["model"]["pretrained"] is model.base
        assert lm_eval["model"]["tokenizer"] == "tokenizer of who/model"
        assert (lm_eval["tasks"], lm_eval["limit"]) == (["arc"], 7)

    def test_its_scores_are_in_the_result(self, causal, data, monkeypatch):
        monkeypatch.setattr(evaluation, "check_tasks", lambda _: None)
        monkeypatch.setattr(evaluation, "run_tasks", lambda *_: {"arc": {"acc,none": 0.25}})
        result = scored(f"adapter={causal[0]}/adapter", *data, "tasks=arc")
        assert result["tasks"]["arc"]["acc,none"] == 0.25
        assert table(result).splitlines()[-1].split() == ["arc", "acc,none", "0.25"]

    def test_a_model_without_files_is_refused(self, causal, data, lm_eval):
        with pytest.raises(SettingsError, match="has no tokenizer"):
            scored(f"adapter={causal[0]}/adapter", *data, "tasks=arc")

    def test_without_the_package_nothing_is_loaded(self, data, monkeypatch):
        monkeypatch.setattr(packages.importlib.util, "find_spec", lambda _: None)
        with pytest.raises(SettingsError, match=r"pip install .*lm-eval"):
            scored("adapter=/nowhere", *data, "tasks=arc")


def test_the_script(causal, data, tmp_path):
    moved = shutil.copytree(causal[0] / "adapter", tmp_path / "moved")
    done = run_program("scripts/evaluate.py", f"adapter={moved}", *data)
    assert done.returncode == 0
    assert "perplexity" in done.stdout
    wrong = run_program("scripts/evaluate.py", f"adapter={tmp_path}", *data)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: ")
    assert len(wrong.stderr.splitlines()) == 1


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"needs {STORIES.name} under {STORIES.parent}")
def test_lm_eval_itself_finds_the_same_losses(tmp_path):
    pytest.importorskip("lm_eval")
    rows = [
        {"instruction": "Once upon a time there was a", "response": " little girl named Lily"},
        {"instruction": "The dog was very", "response": " happy and ran to the park"},
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tmp_path / "two_ways.yaml"
    task.write_text(
        f"""task: two_ways
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{instruction}}}}"
doc_to_target: "{{{{response}}}}"
target_delimiter: ""
metric_list: [{{metric: perplexity, aggregation: perplexity, higher_is_better: false}}]
"""
    )
    spec = BaseSpec(str(STORIES), task="causal_lm")
    model = CausalSpec(spec, "all-linear").build()
    torch.manual_seed(3)
    adapter = Adapter(
        {
            name: LoraFactors(torch.randn(2, s.in_features), 0.1 * torch.randn(s.out_features, 2))
            for name, s in model.shapes().items()
        }
    )
    model.load_whole(adapter)
    model.eval()

    found = harness.run_tasks(model, spec, [str(task)], None)

    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    losses = []
    for row in rows:
        prompt, whole = (
            tokenizer(text, return_tensors="pt").input_ids
            for text in (row["instruction"], row["instruction"] + row["response"])
        )
        logits = model.base(whole).logits[0, :-1].log_softmax(-1)
        picked = logits.gather(1, whole[0, 1:, None])[prompt.shape[1] - 1 :]
        losses.append(-picked.sum().item())
    expected = math.exp(sum(losses) / len(losses))
    assert found["two_ways"]["perplexity,none"] == pytest.approx(expected, rel=1e-4)
