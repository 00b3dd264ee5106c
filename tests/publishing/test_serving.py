"""One folder of adapters that vLLM serves side by side."""

import json
import shlex

import pytest
from huggingface_hub import ModelCard
from publishing_factories import RANK, adapter_for, bert_base, llama_base, save_run, spec_of

from hafl_app.publishing.export import ExportRequest, export_adapter
from hafl_app.publishing.serving import max_lora_rank
from hafl_app.publishing.truncation import truncate_adapter
from hafl_app.training.adapter_files import read_adapter
from hafl_app.training.causal import CausalSpec
from hafl_app.training.settings import BaseSpec


@pytest.fixture
def made(tmp_path):
    """A run whose devices have ranks 2 and 6, and its adapter of rank 6."""
    spec = spec_of("causal", llama_base(tmp_path / "llama"))
    adapter = adapter_for(spec.build())
    return save_run(tmp_path / "run", spec, adapter), adapter


def served(folder) -> list[str]:
    """Return the words of the card's command."""
    text = (folder / "README.md").read_text()
    return shlex.split(text.partition("```bash\n")[2].partition("\n```")[0])


class TestFolder:
    def test_has_an_adapter_for_each_device(self, made, tmp_path):
        run, adapter = made
        written = export_adapter(ExportRequest(run, tmp_path / "out", vllm=True))

        assert [one.folder.name for one in written] == ["rank-2", f"rank-{RANK}"]
        for rank in (2, RANK):
            config = json.loads((tmp_path / f"out/rank-{rank}/adapter_config.json").read_text())
            assert (config["r"], config["lora_alpha"]) == (rank, rank)
            read = read_adapter(tmp_path / "out" / f"rank-{rank}").adapter
            expected = truncate_adapter(adapter, rank).adapter
            for name, factors in expected.modules.items():
                change = read.modules[name].delta_weight() - factors.delta_weight()
                assert change.abs().max() < 1e-6

    def test_or_for_the_ranks_that_are_given(self, made, tmp_path):
        export_adapter(ExportRequest(made[0], tmp_path / "out", vllm=True, ranks=[3, 1]))

        assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir()) == [
            "rank-1",
            "rank-3",
        ]

    def test_the_command_serves_all_of_them(self, made, tmp_path):
        out = tmp_path / "out"
        export_adapter(ExportRequest(made[0], out, vllm=True, base="someone/llama"))

        words = served(out)
        assert words[:4] == ["vllm", "serve", "someone/llama", "--enable-lora"]
        options = dict(zip(words[4:8:2], words[5:9:2], strict=True))
        assert options == {"--max-lora-rank": "8", "--max-loras": "2"}
        assert words[8] == "--lora-modules"
        modules = dict(word.split("=") for word in words[9:])
        assert list(modules) == ["rank-2", "rank-6"]
        assert all((out / path / "adapter_config.json").is_file() for path in modules.values())

    def test_a_request_names_an_adapter_and_has_the_prompt_of_the_training(self, made, tmp_path):
        export_adapter(ExportRequest(made[0], tmp_path / "out", vllm=True))

        text = (tmp_path / "out" / "README.md").read_text()
        request = next(line for line in text.splitlines() if line.startswith("curl "))
        body = json.loads(shlex.split(request)[-1])
        assert (body["model"], body["prompt"]) == ("rank-2", "{text} another")

    def test_the_card_is_the_hubs(self, made, tmp_path):
        export_adapter(ExportRequest(made[0], tmp_path / "out", vllm=True, base="someone/llama"))

        data = ModelCard.load(tmp_path / "out" / "README.md").data
        assert data.base_model == "someone/llama"
        assert data.license == "mit"
        assert "vllm" in data.tags

    def test_a_revision_and_code_of_the_base_are_in_the_command(self, tmp_path):
        spec = spec_of("causal", llama_base(tmp_path / "llama"), revision="abc")
        run = save_run(tmp_path / "run", spec, adapter_for(spec.build()))
        request = ExportRequest(run, tmp_path / "out", vllm=True, trust_remote_code=True)
        export_adapter(request)

        assert served(tmp_path / "out")[2:6] == [
            "llama",
            "--revision",
            "abc",
            "--trust-remote-code",
        ]


@pytest.mark.parametrize(("largest", "room"), [(1, 1), (2, 8), (8, 8), (9, 16), (300, 320)])
def test_vllm_has_room_in_steps(largest, room):
    assert max_lora_rank(largest) == room


class TestRefusals:
    def test_a_head(self, tmp_path):
        spec = spec_of("cls", bert_base(tmp_path / "bert"))
        self.refused(tmp_path, spec, "the adapter's task is classification; expected causal_lm")

    def test_random_weights(self, tmp_path):
        spec = CausalSpec(BaseSpec("", task="causal_lm", random_weights=True))
        self.refused(tmp_path, spec, "the base model has random weights, so there is none to serve")

    def test_a_base_that_is_cut(self, tmp_path):
        spec = spec_of("causal", llama_base(tmp_path / "llama"), num_layers=1)
        self.refused(tmp_path, spec, "the base model is cut to 1 layers, and vLLM serves all")

    def test_a_rank_beyond_vllms(self, tmp_path):
        spec = spec_of("causal", llama_base(tmp_path / "llama"))
        self.refused(tmp_path, spec, "rank 513: expected at most 512", rank=513)

    @staticmethod
    def refused(tmp_path, spec, reason, rank=RANK) -> None:
        run = save_run(tmp_path / "run", spec, adapter_for(spec.build(), rank))
        with pytest.raises(ValueError, match=f"--vllm: {reason}") as caught:
            export_adapter(ExportRequest(run, tmp_path / "out", vllm=True))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
