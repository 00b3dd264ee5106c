import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from publishing_factories import LABELS, RANK, adapter_for, bert_base, save_run, spec_of

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
