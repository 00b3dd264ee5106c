"""Mistakes of newcomers: what was typed, what the one line says, and the exit status."""

from pathlib import Path

import pytest
from programs import run_program

from hafl_app.config.files import groups
from hafl_app.config.habits import CHOICES, SETTINGS
from hafl_app.config.schema import declared_settings

REFUSED = [
    # names from elsewhere
    ("simulate rounds=3", "rounds=3: no such setting; did you mean federation.num_rounds?"),
    ("simulate lr=0.1", "did you mean client.learning_rate?"),
    ("simulate client.lr=0.1", "did you mean client.learning_rate?"),
    ("simulate epochs=2", "did you mean client.local_epochs?"),
    ("simulate r=8", "did you mean lora.max_rank?"),
    ("simulate lora.r=8", "lora.r=8: no such setting; did you mean lora.max_rank?"),
    ("simulate lora.alpha=16", "did you mean lora.lora_alpha?"),
    ("simulate alpha=0.1", "did you mean lora.lora_alpha or partition.dirichlet_alpha?"),
    ("simulate batch_size=8", "did you mean client.batch_size?"),
    ("simulate num_clients=4", "did you mean federation.num_clients?"),
    ("simulate fraction_fit=0.5", "did you mean federation.fraction_train?"),
    ("simulate use_rslora=true", "did you mean lora.scaling=rslora?"),
    ("simulate +lr=0.1", "did you mean client.learning_rate?"),
    # models and data
    ("simulate model_name_or_path=org/model", "did you mean model=encoder model.path=..."),
    ("simulate model=org/model", "did you mean model=encoder model.path=org/model"),
    ("simulate model.name=org/model", "model.name=org/model: only the label"),
    ("simulate model.path=org/model", "are those of sentence-transformers/all-MiniLM-L6-v2"),
    ("simulate dataset=mine.csv", "did you mean dataset=local dataset.path=mine.csv?"),
    ("simulate strategy=fedavg", "did you mean strategy=fedit?"),
    ("simulate strategy=fedprox", "did you mean client.proximal=0.01?"),
    ("simulate federation.server_optimizer.lr=1", "federation.server_optimizer.learning_rate?"),
    # a setting of another strategy
    ("simulate strategy=flexlora strategy.smoothing=0.5", "strategy=fedara or hafl or hafl_plus"),
    ("simulate pruning=false", "strategy.pruning belongs to strategy=hetlora, not to this one"),
    ("simulate strategy=fedit strategy.learning_rate=1", "did you mean client.learning_rate?"),
    # another form
    ("simulate --rounds 3", "did you mean federation.num_rounds=3?"),
    ("simulate --lr=0.1", "did you mean client.learning_rate=0.1?"),
    ("simulate --dataset local", "did you mean dataset=local?"),
    ("simulate --nope", "unrecognized arguments: --nope"),
    ("simulate federation.num_rounds 3", "federation.num_rounds: expected name=value"),
    ("simulate client.learning_rate=-1", "client.learning_rate=-1.0: must be above 0"),
    ("simulate federation.num_rounds=3.5", "federation.num_rounds"),
    ("simulate strategy=hafl,flexlora", "add -m"),
    ("evaluate adapter=x strategy=hafl", "strategy=: of training"),
    ("simulate report_to=wandb", "did you mean tracking?"),
    ("simulate tracking=tensorbord", "did you mean tensorboard?"),
    ("compare seeds=0,1", "experiment= or methods= must be given, as in methods=hafl,flexlora"),
    ("compare methods=fedavg,hafl", "did you mean strategy=fedit?"),
    ("compare experiment=hafl_banking77 --seeds 0,1", "--seeds: expected key=value"),
]


@pytest.mark.parametrize(("line", "answer"), REFUSED, ids=[line for line, _ in REFUSED])
def test_a_mistake_is_one_line_that_knows_what_was_meant(line, answer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program, *arguments = line.split()

    done = run_program(f"scripts/{program}.py", *arguments)

    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert answer in done.stderr
    assert not list(Path.cwd().iterdir())


def test_help_without_hyphens_is_help():
    assert run_program("scripts/simulate.py", "help").stdout
    assert "Compare methods" in run_program("scripts/compare.py", "help").stdout


def test_every_hint_names_what_exists():
    known = {*groups(), *(found.name for found in declared_settings())}
    for hint in (*SETTINGS.values(), *CHOICES["strategy"].values(), *CHOICES["partition"].values()):
        for word in hint.replace("(", "").replace(")", "").split():
            name, _, value = word.partition("=")
            if "=" in word or "." in word:
                assert name in known, hint
            if name in groups() and value not in ("", "..."):
                assert value in groups()[name], hint
    assert not known & set(SETTINGS) - {"dataset", "strategy", "seed"}  # what exists needs no hint
