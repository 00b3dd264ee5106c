"""scripts/export.py, from the command line to the folders."""

import pytest
from publishing_factories import adapter_for, llama_base, save_run, spec_of

from hafl_app.publishing import push as push_module
from scripts import export


@pytest.fixture
def run(tmp_path):
    spec = spec_of("causal", llama_base(tmp_path / "llama"))
    return save_run(tmp_path / "run", spec, adapter_for(spec.build()))


def main(monkeypatch, *arguments):
    monkeypatch.setattr(export.sys, "argv", ["export.py", *map(str, arguments)])
    return export.main()


def test_prints_what_each_module_loses(monkeypatch, run, tmp_path, capsys):
    assert main(monkeypatch, run, "--output", tmp_path / "out", "--rank", 2, 4) == 0

    told = capsys.readouterr().out
    for rank in (2, 4):
        assert f"Written: {tmp_path}/out/rank-{rank} (" in told
    assert told.count("% of the squared norm; by module:") == 2
    assert told.count("%  model.layers.0.self_attn.q_proj\n") == 2


def test_merges(monkeypatch, run, tmp_path):
    assert main(monkeypatch, run, "--output", tmp_path / "out", "--merge") == 0

    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--rank", "9"], "error: rank 9: expected 1 to 6, the rank of the adapter"),
        (["--dtype", "int3", "--merge"], "error: --dtype int3: expected one of float32"),
        (
            ["--dtype", "bfloat16"],
            "error: --dtype bfloat16: of merged weights, add --merge; an adapter stays as it is",
        ),
        (["--dtype", "float32"], "error: --dtype float32: of merged weights, add --merge"),
        (["--dtype", "bfloat16", "--rank", "2"], "error: --dtype bfloat16: of merged weights"),
        (
            ["--dtype", "bfloat61", "--merge"],
            "error: --dtype bfloat61: expected one of float32, bfloat16, float16; did you mean "
            "'bfloat16'?",
        ),
        (["--rank", "0"], "error: rank 0: expected 1 to 6, the rank of the adapter"),
        (["--public"], "error: --public: nothing is uploaded without --push USER/NAME"),
        (["--base", "/home/me/llama"], "error: --base /home/me/llama: expected a name on the hub"),
        (["--base", ""], "error: --base : expected a name on the hub"),
        (["--push", "nobody"], "error: --push nobody: expected USER/NAME"),
        (["--push", "me/it"], "error: --push me/it: HF_HUB_OFFLINE is set"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    monkeypatch, run, tmp_path, capsys, arguments, told
):
    assert main(monkeypatch, run, "--output", tmp_path / "out", *arguments) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(told)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("inside", ["adapter/out", "summary.json/out"])
def test_an_output_in_the_wrong_place_is_one_line(monkeypatch, run, capsys, inside):
    before = sorted(run.rglob("*"))

    assert main(monkeypatch, run, "--output", run / inside) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --output {run / inside}: ")
    assert sorted(run.rglob("*")) == before


def test_each_rank_has_a_repository_of_its_own(monkeypatch, run, tmp_path, capsys):
    pushed = []

    def push(folder, repo, *, public):
        pushed.append((folder.name, repo, public))
        return f"https://huggingface.co/{repo}"

    monkeypatch.setattr(push_module, "check_push", lambda repo: None)
    monkeypatch.setattr(push_module, "push_folder", push)

    arguments = ["--output", tmp_path / "out", "--rank", 2, 4, "--push", "me/it"]
    assert main(monkeypatch, run, *arguments) == 0

    assert pushed == [("rank-2", "me/it-rank-2", False), ("rank-4", "me/it-rank-4", False)]
    assert "Pushed:  https://huggingface.co/me/it-rank-4\n" in capsys.readouterr().out
