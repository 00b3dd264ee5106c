import ast
import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from publishing_factories import LABELS, RANK, adapter_for, bert_base, save_run, spec_of

from hafl_app.printable import markdown_text, printable
from hafl_app.publishing.card import add_card
from hafl_app.publishing.export import ExportRequest, export_adapter
from hafl_app.training.causal import CausalSpec
from hafl_app.training.settings import BaseSpec


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return bert_base(tmp_path_factory.mktemp("hub") / "bert")


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory) -> Path:
    spec = spec_of("cls", base)
    return save_run(tmp_path_factory.mktemp("runs") / "run", spec, adapter_for(spec.build()))


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def exported_card(run: Path, out: Path, **settings) -> ModelCard:
    (written, *_) = export_adapter(ExportRequest(run, out, **settings))
    return ModelCard.load(written.folder / "README.md")


class TestFrontMatter:
    def test_of_an_adapter(self, run, tmp_path):
        data = exported_card(run, tmp_path / "out", base="someone/bert").data

        assert data.base_model == "someone/bert"
        assert data.library_name == "peft"
        assert data.license == "mit"  # of the folder that the run had
        assert data.pipeline_tag == "text-classification"
        assert data.datasets == ["mteb/banking77"]
        assert data.metrics == ["accuracy"]
        assert {"lora", "federated-learning"} <= set(data.tags)
        (result,) = data.eval_results
        assert (result.dataset_type, result.dataset_split) == ("mteb/banking77", "test")
        assert (result.metric_type, result.metric_value) == ("accuracy", 0.8)

    def test_the_license_is_that_of_the_base_models_card(self, run, tmp_path, base):
        assert exported_card(run, tmp_path / "out").data.license == "mit"

    def test_without_a_card_there_is_no_license(self, run, tmp_path, base):
        moved = Path(shutil.copytree(base, tmp_path / "bert"))
        (moved / "README.md").unlink()
        name_base(run, moved)

        card = exported_card(run, tmp_path / "out")

        assert card.data.license is None
        assert "states no license" in card.text

    def test_a_folder_of_this_machine_is_no_name_for_others(self, run, tmp_path, base):
        card = exported_card(run, tmp_path / "out")

        assert card.data.base_model is None
        assert str(base.parent) not in card.content
        assert "/home/me/data" not in card.content

    def test_nor_is_a_folder_by_a_relative_path(self, run, tmp_path, base, monkeypatch):
        monkeypatch.chdir(base.parent)
        name_base(run, Path(base.name))

        assert exported_card(run, tmp_path / "out").data.base_model is None

    def test_of_a_merged_model(self, run, tmp_path):
        assert exported_card(run, tmp_path / "out", merge=True).data.library_name == "transformers"

    @pytest.mark.parametrize(("rank", "score"), [(2, 0.71), (3, None)])
    def test_a_cut_adapter_claims_only_what_was_measured_for_it(self, run, tmp_path, rank, score):
        card = exported_card(run, tmp_path / "out", ranks=[rank])

        results = card.data.eval_results or []
        assert [r.metric_value for r in results] == ([score] if score else [])
        assert ("After the cut, on test data: accuracy 71.0%." in card.text) is bool(score)

    def test_the_best_round_was_not_measured_at_smaller_ranks(self, run, tmp_path):
        change_card(run, lambda card: card["facts"].update(server_round=3))

        assert exported_card(run, tmp_path / "out", ranks=[2]).data.eval_results is None


class TestText:
    def test_describes_the_run(self, run, tmp_path):
        text = exported_card(run, tmp_path / "out").text

        for told in (
            f"LoRA of rank {RANK}",
            "| data | mteb/banking77, label skew Dirichlet(0.5) |",
            f"| clients | 3: 2 of rank 2, 1 of rank {RANK} |",
            f"| method | Hafl (max_rank={RANK}, scheme=freezing) |",
            "| round | 4 |",
            # three trainings of 1 MB down and 0.5 MB up each
            "| bytes | 3 MB down, 1.5 MB up; of one training, ",
            "down / up at rank: 1 MB / 0.5 MB at 2 |",
            "| test data | accuracy | 80.0% | one seed |",
            "without differential privacy",
            f"{len(LABELS)} classes",
        ):
            assert told in text

    def test_the_code_asks_for_the_runs_revision(self, run, tmp_path):
        change_card(run, lambda card: card["base"].update(revision="abc"))

        text = exported_card(run, tmp_path / "out").text

        assert 'revision = "abc"\n' in text
        assert text.count("from_pretrained(base, revision=revision") == 2

    def test_says_what_the_bases_weights_went_through(self, run, tmp_path):
        assert "on the hub are whole" not in exported_card(run, tmp_path / "before").text
        note = "read from a.Q4_1.gguf: they went through 4 bits (Q4_1)"
        change_card(run, lambda card: card["facts"].update(base_weights=note))

        text = exported_card(run, tmp_path / "out").text

        assert f"its weights {note} |" in text.replace("\\", "")
        assert "on the hub are whole: on those it was not measured" in text

    def test_reports_the_loss_of_a_cut(self, run, tmp_path):
        (written,) = export_adapter(ExportRequest(run, tmp_path / "out", ranks=[2]))
        cut = written.export.truncation
        text = (written.folder / "README.md").read_text()

        assert f"{cut.lost:.2%} of the squared norm is lost" in text
        for name, share in cut.lost_by_module.items():
            assert f"| {name} | {share:.2%} |" in text
        assert "## Scores of the adapter before the cut" in text

    def test_epsilon_of_a_private_run(self, run, tmp_path):
        (run / "config.yaml").write_text("privacy: {kind: central_dp, delta: 1.0e-05}\n")
        change_card(run, lambda card: card["facts"]["metrics"].update({"privacy/epsilon": 3.14159}))

        text = exported_card(run, tmp_path / "out").text

        assert "| privacy | central_dp, delta 1e-05, epsilon 3.14 |" in text
        assert "without differential privacy" not in text

    def test_other_seeds_beside_it_are_a_spread(self, base, tmp_path):
        spec = spec_of("cls", base)
        adapter = adapter_for(spec.build())
        for seed in (0, 1, 2):
            save_run(tmp_path / "hafl" / f"seed{seed}", spec, adapter, seed=seed)
        odd = tmp_path / "hafl" / "seed9"
        save_run(odd, spec, adapter, seed=9)
        summary = json.loads((odd / "summary.json").read_text())
        (odd / "summary.json").write_text(json.dumps({**summary, "rounds": 9}))

        text = exported_card(tmp_path / "hafl" / "seed1", tmp_path / "out").text

        # 0.80, 0.82 and 0.84; seed 9 is of another run
        assert "| test data | accuracy | 82.0% | 82.0% ± 2.0% of 3 |" in text

    def test_an_adapter_without_its_run(self, run, tmp_path):
        (run / "adapter").rename(tmp_path / "alone")

        card = exported_card(tmp_path / "alone", tmp_path / "out")

        assert "| method | Hafl (" in card.text
        assert "| clients |" not in card.text
        assert card.data.datasets is None

    def test_a_cut_one_that_is_exported_again(self, run, tmp_path):
        export_adapter(ExportRequest(run, tmp_path / "cut", ranks=[3]))

        card = exported_card(tmp_path / "cut" / "rank-3", tmp_path / "out", merge=True)

        assert "LoRA of rank 3" in card.text
        assert "## Scores of the adapter before the cut" in card.text
        assert card.data.eval_results is None

    def test_heads_that_stayed_with_the_clients(self, run, tmp_path):
        change_card(run, lambda card: card["facts"].update(head="local"))

        assert "was never trained" in exported_card(run, tmp_path / "out").text

    def test_training_in_one_place_is_not_called_federated(self, run, tmp_path):
        change_card(run, lambda card: card.update(facts={"centralized": True, "seed": 0}))
        (run / "summary.json").write_text('{"status": "finished", "final": {}}')

        card = exported_card(run, tmp_path / "out")

        assert "on all data in one place" in card.text
        assert card.data.tags == ["lora"]

    def test_an_unfinished_run(self, run, tmp_path):
        (run / "summary.json").write_text('{"status": "failed", "reason": "no"}')

        assert "| clients |" not in exported_card(run, tmp_path / "out").text

    @pytest.mark.parametrize(
        ("file", "content"),
        [
            ("summary.json", "{"),
            ("summary.json", "[]"),
            ("config.yaml", "a: [1"),
            ("config.yaml", "[1, 2]"),
        ],
    )
    def test_files_of_a_run_that_cannot_be_read_are_refused(self, run, tmp_path, file, content):
        (run / file).write_text(content)

        with pytest.raises(ValueError, match=f"{file}: not the s[a-z]+ of a run: ") as refusal:
            export_adapter(ExportRequest(run, tmp_path / "out"))

        assert "\n" not in str(refusal.value)

    def test_random_weights_are_only_for_this_project(self, tmp_path):
        spec = CausalSpec(BaseSpec("", random_weights=True, task="causal_lm"))
        run = save_run(tmp_path / "run", spec, adapter_for(spec.build()))

        text = exported_card(run, tmp_path / "out").text

        assert 'load_adapter("out")' in text


NASTY = 'x|y `z`\n---\n<script>alert(1)</script> [a](javascript:b) "; import os #\x1b[2J ```'


def imports_of(code: str) -> set[str]:
    found = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import)]
    return {alias.name for node in found for alias in node.names}


def code_of(content: str) -> str:
    return content.partition("```python\n")[2].partition("```")[0]


class TestForeignText:
    """What a file or a setting says is shown, and marks nothing up."""

    @pytest.fixture
    def content(self, run):
        settings = {
            "dataset": {"source": NASTY, "hub": NASTY, "template": NASTY},
            "partition": {"kind": NASTY},
            "privacy": {"kind": NASTY, "delta": NASTY},
        }
        (run / "config.yaml").write_text(json.dumps(settings))
        change_card(run, lambda card: card["base"].update(path=NASTY, revision=NASTY))
        odd = {
            "strategy": {"_target_": f"some.{NASTY}", NASTY: NASTY},
            "server_round": NASTY,
            "seed": NASTY,
        }
        change_card(run, lambda card: card["facts"].update(odd))
        add_card(run / "adapter")
        return (run / "adapter" / "README.md").read_text()

    def test_nothing_is_marked_up(self, content):
        parser = MarkdownIt("commonmark", {"html": True}).enable("table")
        found = parser.parse(ModelCard(content).text)
        kinds = [token.type for each in found for token in (each, *(each.children or ()))]

        markup = {"html_block", "html_inline", "link_open", "image", "hr", "code_inline"}
        assert not markup & set(kinds)
        headings = [token.tag for token in found if token.type == "heading_open"]
        assert headings == ["h1", "h2", "h2", "h2", "h2"]
        assert kinds.count("table_open") == 2
        assert kinds.count("fence") == 1
        assert "\x1b" not in content

    def test_tables_stay_tables(self, content):
        shown = markdown_text(NASTY)
        rows = [line for line in content.splitlines() if line.startswith("| ")]

        for name in ("base model", "data", "method", "round", "seed", "privacy"):
            (row,) = [row for row in rows if row.startswith(f"| {name} | ")]
            assert shown in row
            assert row.replace("\\|", "").count("|") == 3

    def test_the_front_matter_has_no_other_keys(self, content):
        data = ModelCard(content).data.to_dict()

        assert set(data) == {
            *("library_name", "datasets", "metrics", "pipeline_tag", "tags", "model-index")
        }
        assert data["datasets"] == [printable(NASTY)]

    def test_the_code_holds_it_as_text(self, content):
        code = code_of(content)

        texts = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
        assert texts.count(NASTY) == 2  # base and revision
        assert imports_of(code) == {"json", "torch"}

    def test_so_it_does_a_folders_name(self, run):
        folder = (run / "adapter").rename(run / 'a"; import os #`|[x](y)')

        add_card(folder)

        content = (folder / "README.md").read_text()
        assert "import os" in code_of(content)
        assert imports_of(code_of(content)) == {"json", "torch"}
        assert ModelCard(content).data.model_name == folder.name

    def test_and_a_license_of_the_base_models_card(self, run, tmp_path, base):
        moved = Path(shutil.copytree(base, tmp_path / "bert"))
        (moved / "README.md").write_text(f"---\nlicense: {json.dumps(NASTY)}\n---\n")
        name_base(run, moved)

        card = exported_card(run, tmp_path / "out")

        assert card.data.license == printable(NASTY)
        assert f"states it: {markdown_text(NASTY)}." in card.text


class TestRandomWeights:
    @pytest.fixture
    def card(self, tmp_path):
        spec = CausalSpec(BaseSpec("", random_weights=True, task="causal_lm"))
        run = save_run(tmp_path / "run", spec, adapter_for(spec.build()))
        return exported_card(run, tmp_path / "out")

    def test_are_in_the_text(self, card):
        assert "# Adapter of a built-in model with random weights\n" in card.text
        assert "| base model | a built-in model with random weights |" in card.text
        assert "- The base model's weights are random, it was never trained" in card.text

    def test_are_where_the_hub_lists_the_model(self, card):
        assert "random-weights" in card.data.tags
        assert card.data.model_name == "out (random weights)"

    def test_in_the_shape_of_a_model_are_not_listed_under_it(self, run):
        change_card(run, lambda card: card["base"].update(path="some/bert", random_weights=True))

        add_card(run / "adapter")

        card = ModelCard.load(run / "adapter" / "README.md")
        assert card.data.base_model is None
        assert "# Adapter of some/bert with random weights\n" in card.text

    def test_are_not_said_of_others(self, run, tmp_path):
        assert "random" not in exported_card(run, tmp_path / "out").content


class TestAddCard:
    def test_writes_into_the_adapters_folder_without_the_network(self, run, monkeypatch):
        add_card(run / "adapter")

        card = ModelCard.load(run / "adapter" / "README.md")
        assert card.data.library_name == "peft"
        assert f"3: 2 of rank 2, 1 of rank {RANK}" in card.text
        assert 'folder = "adapter"' in card.text


def change_card(run: Path, change) -> None:
    file = run / "adapter" / "hafl.json"
    card = json.loads(file.read_text())
    change(card)
    file.write_text(json.dumps(card))


def name_base(run: Path, base: Path) -> None:
    change_card(run, lambda card: card["base"].update(path=str(base)))
