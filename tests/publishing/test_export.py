import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from publishing_factories import (
    IDS,
    LABELS,
    MASK,
    RANK,
    adapter_for,
    bert_base,
    llama_base,
    save_run,
    spec_of,
)
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
)

from hafl_app.publishing import export as export_module
from hafl_app.publishing.export import ExportRequest, Written, export_adapter
from hafl_app.publishing.truncation import truncate_adapter
from hafl_app.training.adapter_card import SavedAdapterError
from hafl_app.training.adapter_files import load_adapter, read_adapter
from hafl_app.training.causal import CausalSpec
from hafl_app.training.locate import ModelError
from hafl_app.training.settings import BaseSpec

pytestmark = pytest.mark.slow

KINDS = {
    "causal": AutoModelForCausalLM,
    "cls": AutoModelForSequenceClassification,
    "mean": AutoModel,
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    bert = bert_base(tmp_path_factory.mktemp("hub") / "bert")
    return {"causal": llama_base(bert.parent / "llama"), "cls": bert, "mean": bert}


@pytest.fixture
def made(bases, tmp_path, monkeypatch):
    """Return a function that makes a run of a kind: its folder, own model and adapter."""
    # The cards name a base that is a folder by its name alone.
    monkeypatch.chdir(bases["cls"].parent)

    def make(kind, ranks=RANK, **settings):
        spec = spec_of(kind, bases[kind], **settings)
        model = spec.build()
        adapter = adapter_for(model, ranks)
        model.load_whole(adapter)
        return save_run(tmp_path / "run", spec, adapter), model.eval(), adapter

    return make


def uneven(name: str) -> int:
    return 3 + len(name) % 4


def run_card(written: Written) -> dict:
    """Run the code of a card as it is printed, in the folder that the export is in."""
    text = (written.folder / "README.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    assert "hafl_app" not in code
    names = {}
    link = Path(written.export.name)
    link.symlink_to(written.folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(code, names)
    finally:
        link.unlink()
    return {**names, "said": said.getvalue()}


def logits_of(kind: str, names: dict) -> torch.Tensor:
    with torch.no_grad():
        return names["model"](**names["inputs"]).logits if kind == "causal" else names["logits"]


def own_logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(inputs["input_ids"], inputs["attention_mask"])


class TestCardsCode:
    """Every card's code is run, and scores what our own model scores: without our own code."""

    @pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
    @pytest.mark.parametrize("ranks", [RANK, uneven], ids=["one rank", "mixed"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_scores_like_our_own_model(self, made, tmp_path, kind, ranks, merge):
        run, model, _ = made(kind, ranks)
        (written,) = export_adapter(ExportRequest(run, tmp_path / "out", merge=merge))

        names = run_card(written)

        expected = own_logits(model, names["inputs"])
        torch.testing.assert_close(logits_of(kind, names), expected, rtol=0, atol=1e-5)
        assert names["said"].endswith("\n")

    @pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
    @pytest.mark.parametrize("kind", ["cls", "mean"])
    def test_the_base_is_cut_as_in_the_run(self, made, tmp_path, kind, merge):
        run, model, _ = made(kind, num_layers=2)  # of three
        (written,) = export_adapter(ExportRequest(run, tmp_path / "out", merge=merge))

        names = run_card(written)

        expected = own_logits(model, names["inputs"])
        torch.testing.assert_close(logits_of(kind, names), expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
    @pytest.mark.parametrize("trusted", [False, True])
    def test_trusts_a_bases_own_code_only_when_asked(self, made, tmp_path, trusted, merge):
        run, _, _ = made("cls")

        request = ExportRequest(run, tmp_path / "out", merge=merge, trust_remote_code=trusted)
        (written,) = export_adapter(request)

        text = (written.folder / "README.md").read_text()
        assert text.count("trust_remote_code=True") == (2 if trusted else 0)
        run_card(written)

    @pytest.mark.parametrize("kind", ["cls", "mean"])
    def test_names_the_class(self, made, tmp_path, kind):
        run, model, _ = made(kind)
        (written,) = export_adapter(ExportRequest(run, tmp_path / "out", merge=True))

        names = run_card(written)

        classes = own_logits(model, names["inputs"]).argmax(1).tolist()
        assert names["said"] == f"{[LABELS[i] for i in classes]}\n"


class TestRanks:
    @pytest.mark.parametrize("kind", KINDS)
    def test_peft_computes_the_truncated_update(self, made, bases, tmp_path, kind):
        run, _, adapter = made(kind)
        (written,) = export_adapter(ExportRequest(run, tmp_path / "out", ranks=[2]))

        settings = {"num_labels": len(LABELS)} if kind == "cls" else {}
        base = KINDS[kind].from_pretrained(bases[kind], **settings)
        model = PeftModel.from_pretrained(base, written.folder)

        layers = {
            n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)
        }
        assert set(layers) == set(adapter.modules)
        for name, layer in layers.items():
            left, values, right = torch.linalg.svd(
                adapter.modules[name].delta_weight().double(), full_matrices=False
            )
            best = left[:, :2] * values[:2] @ right[:2]
            delta = layer.get_delta_weight("default").double()
            torch.testing.assert_close(delta, best, rtol=0, atol=1e-5)
            assert layer.r["default"] == 2
            assert delta.norm() > 0.5

    @pytest.mark.parametrize("kind", KINDS)
    def test_scores_what_the_truncated_adapter_scores(self, made, tmp_path, kind):
        run, model, adapter = made(kind)
        whole = own_logits(model, {"input_ids": IDS, "attention_mask": MASK})
        (written,) = export_adapter(ExportRequest(run, tmp_path / "out", ranks=[2]))
        model.load_whole(truncate_adapter(adapter, 2).adapter)

        names = run_card(written)
        loaded = load_adapter(written.folder)

        expected = own_logits(model, names["inputs"])
        torch.testing.assert_close(logits_of(kind, names), expected, rtol=0, atol=1e-5)
        inputs = {"input_ids": IDS, "attention_mask": MASK}
        again = own_logits(loaded.model, inputs)
        torch.testing.assert_close(again, own_logits(model, inputs), rtol=0, atol=1e-5)
        assert (again - whole).abs().max() > 1e-3
        assert loaded.label_names == (() if kind == "causal" else LABELS)

    def test_modules_of_smaller_rank_keep_theirs(self, made, tmp_path):
        run, _, adapter = made("cls", uneven)
        (written,) = export_adapter(ExportRequest(run, tmp_path / "out", ranks=[5]))

        read = read_adapter(written.folder).adapter

        expected = {name: min(5, factors.rank) for name, factors in adapter.modules.items()}
        assert len(set(expected.values())) > 1
        assert {name: factors.rank for name, factors in read.modules.items()} == expected

    def test_a_folder_for_each_rank(self, made, tmp_path):
        run, _, _ = made("mean")

        written = export_adapter(ExportRequest(run, tmp_path / "out", ranks=[4, 2, 4]))

        assert [w.folder.name for w in written] == ["rank-2", "rank-4"]
        assert {p.name for p in (tmp_path / "out").iterdir()} == {"rank-2", "rank-4"}
        assert written[0].export.truncation.lost > written[1].export.truncation.lost > 0

    def test_needs_no_base_model(self, made, tmp_path, monkeypatch):
        run, _, _ = made("causal")
        card = json.loads((run / "adapter" / "hafl.json").read_text())
        card["base"]["path"] = str(tmp_path / "nowhere")
        (run / "adapter" / "hafl.json").write_text(json.dumps(card))

        (written,) = export_adapter(ExportRequest(run, tmp_path / "out", ranks=[2]))

        assert (written.folder / "adapter_model.safetensors").is_file()
        with pytest.raises(ModelError, match="nowhere"):
            export_adapter(ExportRequest(run, tmp_path / "merged", merge=True))


class TestMerged:
    def test_the_base_alone_scores_otherwise(self, made, bases, tmp_path):
        run, model, _ = made("causal")
        export_adapter(ExportRequest(run, tmp_path / "out", merge=True))

        def score(folder):
            with torch.no_grad():
                return AutoModelForCausalLM.from_pretrained(folder)(IDS, MASK).logits

        expected = own_logits(model, {"input_ids": IDS, "attention_mask": MASK})
        torch.testing.assert_close(score(tmp_path / "out"), expected, rtol=0, atol=1e-5)
        assert (score(bases["causal"]) - expected).abs().max() > 0.1

    def test_is_an_ordinary_folder(self, made, tmp_path):
        run, _, _ = made("causal")
        export_adapter(ExportRequest(run, tmp_path / "out", merge=True))

        files = {path.name for path in (tmp_path / "out").iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files
        assert not {"hafl.json", "adapter_config.json", "head.safetensors"} & files
        assert json.loads((tmp_path / "out" / "config.json").read_text())["use_cache"] is True
        AutoTokenizer.from_pretrained(tmp_path / "out")

    def test_in_another_dtype(self, made, tmp_path):
        run, model, _ = made("cls")
        export_adapter(ExportRequest(run, tmp_path / "out", merge=True, dtype="bfloat16"))

        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype="auto")

        assert merged.dtype == torch.bfloat16
        expected = own_logits(model, {"input_ids": IDS, "attention_mask": MASK})
        with torch.no_grad():
            logits = merged.float().eval()(IDS, MASK).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=0.1)

    def test_keeps_the_dropout_that_training_left_out(self, made, tmp_path):
        run, model, _ = made("cls")
        assert model.base.config.hidden_dropout_prob == 0.0
        export_adapter(ExportRequest(run, tmp_path / "out", merge=True))

        assert AutoConfig.from_pretrained(tmp_path / "out").hidden_dropout_prob == 0.1

    def test_a_base_without_files(self, tmp_path):
        spec = CausalSpec(BaseSpec("", random_weights=True, task="causal_lm"), seed=9)
        model = spec.build()
        adapter = adapter_for(model)
        model.load_whole(adapter)
        run = save_run(tmp_path / "run", spec, adapter)

        export_adapter(ExportRequest(run, tmp_path / "out", merge=True))

        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        with torch.no_grad():
            logits = merged(IDS, MASK).logits
        expected = own_logits(model.eval(), {"input_ids": IDS, "attention_mask": MASK})
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)

    def test_an_adapter_of_another_base_is_refused(self, made, bases, tmp_path):
        run, _, _ = made("causal")
        card = json.loads((run / "adapter" / "hafl.json").read_text())
        card["base"]["num_layers"] = 1
        (run / "adapter" / "hafl.json").write_text(json.dumps(card))

        with pytest.raises(SavedAdapterError, match=r"^the adapter does not fit its base model: "):
            export_adapter(ExportRequest(run, tmp_path / "out", merge=True))


class TestBaseThatLacksALayer:
    """BERT as a masked language model has no pooler, on which the head of `cls` stands."""

    @pytest.fixture
    def run(self, made, bases, tmp_path):
        poolerless = bert_base(tmp_path / "poolerless")
        BertForMaskedLM.from_pretrained(bases["cls"]).save_pretrained(poolerless)
        bases = {"cls": poolerless}
        spec = spec_of("cls", bases["cls"])
        self.model = spec.build()
        adapter = adapter_for(self.model)
        self.model.load_whole(adapter)
        return save_run(tmp_path / "run", spec, adapter)

    @pytest.mark.parametrize("ranks", [(), (2,)])
    def test_an_adapter_by_itself_is_refused(self, run, tmp_path, ranks):
        with pytest.raises(SavedAdapterError, match=r"pooler.*export with --merge$"):
            export_adapter(ExportRequest(run, tmp_path / "out", ranks=ranks))

        assert not (tmp_path / "out").exists()

    def test_the_merged_model_has_it(self, run, tmp_path):
        export_adapter(ExportRequest(run, tmp_path / "out", merge=True))

        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
        with torch.no_grad():
            logits = merged(IDS, MASK).logits
        expected = own_logits(self.model.eval(), {"input_ids": IDS, "attention_mask": MASK})
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


class TestRequests:
    def test_a_rank_above_the_adapters(self, made, tmp_path):
        run, _, _ = made("cls")

        with pytest.raises(ValueError, match=r"^rank 7: expected 1 to 6, the rank of the adapter$"):
            export_adapter(ExportRequest(run, tmp_path / "out", ranks=[2, 7]))

        assert not (tmp_path / "out").exists()

    def test_no_adapter(self, tmp_path):
        with pytest.raises(SavedAdapterError, match="not a saved adapter"):
            export_adapter(ExportRequest(tmp_path / "nothing", tmp_path / "out"))

    def test_merging_and_cutting_at_once(self, tmp_path):
        with pytest.raises(ValueError, match="--merge and --rank"):
            ExportRequest(tmp_path, tmp_path / "out", merge=True, ranks=[2])

    def test_an_unknown_dtype(self, tmp_path):
        with pytest.raises(ValueError, match="--dtype int3: expected one of float32, "):
            ExportRequest(tmp_path, tmp_path / "out", merge=True, dtype="int3")

    def test_an_adapters_own_folder(self, made, tmp_path):
        run, _, _ = made("cls")
        (run / "adapter").rename(run / "adapter-best")

        (written,) = export_adapter(ExportRequest(run / "adapter-best", tmp_path / "out"))

        assert written.export.run.summary["rounds"] == 4

    def test_a_failure_leaves_nothing(self, made, tmp_path, monkeypatch):
        run, _, _ = made("cls")
        cards = []

        def fails_the_second_time(*args, **kwargs):
            cards.append(args)
            if len(cards) == 2:
                raise OSError("disk full")
            return real(*args, **kwargs)

        real = export_module.model_card
        monkeypatch.setattr(export_module, "model_card", fails_the_second_time)
        with pytest.raises(OSError, match="disk full"):
            export_adapter(ExportRequest(run, tmp_path / "out", ranks=[2, 3]))

        assert [p.name for p in tmp_path.iterdir()] == ["run"]

    def test_force_replaces_an_earlier_export(self, made, tmp_path):
        run, _, _ = made("cls")
        export_adapter(ExportRequest(run, tmp_path / "out", ranks=[2]))

        with pytest.raises(ValueError, match="not empty"):
            export_adapter(ExportRequest(run, tmp_path / "out", ranks=[3]))
        export_adapter(ExportRequest(run, tmp_path / "out", ranks=[3], force=True))

        assert [p.name for p in (tmp_path / "out").iterdir()] == ["rank-3"]

    @pytest.mark.parametrize("merge", [False, True])
    def test_another_name_for_the_base(self, made, tmp_path, merge):
        run, _, _ = made("causal")

        request = ExportRequest(run, tmp_path / "out", merge=merge, base="someone/llama")
        (written,) = export_adapter(request)

        for file in written.folder.glob("*.json"):
            assert str(tmp_path.parent) not in file.read_text(), file
        assert "base_model: someone/llama\n" in (written.folder / "README.md").read_text()
