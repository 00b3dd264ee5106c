"""What is no override, and what an override may not do, is refused in one line."""

import pytest
from programs import ROOT, run_program

from hafl_app.config.compose import SettingsError, compose
from hafl_app.config.overrides import quoted, unquoted
from hafl_app.experiments.command import parse_command
from hafl_app.experiments.comparison import Comparison
from hafl_app.experiments.evaluation_request import read_request
from hafl_app.run.build import settings_of_run
from hafl_app.run.command_line import CommandLine

FORM = "expected name=value; a value with spaces"
GRAMMAR = ("Exception", "viable", "mismatched", "EOF", "Error parsing", "ChoiceSweep", "\n")
REFUSED = [
    # no override
    *((text, FORM) for text in ("a==b", "seed='1", "seed=[1", "seed={a", "ü=1", "seed=ü", "seed")),
    *((text, FORM) for text in ("", "  ", "+", "'x'=1", "seed=\x00", "lora.target_modules=[a,")),
    # outside the schema
    ("=x", "no such setting"),
    ("~", "no such setting"),
    ("+=1", "no such setting"),
    ("+nme=1", "nme: no such setting"),
    ("++nme=1", "nme: no such setting"),
    ("~nme", "~nme: no such setting"),
    ("+strategy.x=1", "strategy.x: Key 'x' not in 'Hafl'"),
    ("++strategy.x=1", "strategy.x: Key 'x' not in 'Hafl'"),
    ("+client.foo.bar=1", "client.foo: no such setting"),
    ("+a=[1]", "a: no such setting"),
    ("+b={c:1}", "b: no such setting"),
    ("+experiment=foo", "no such experiment"),
    ("+ranks.tiers.0.foo=1", "ranks.tiers.0.foo: no such setting; did you mean ranks.tiers.0.rank"),
    ("ranks.tiers=[{rank:1,share:1,foo:2}]", "'foo'"),
    ("+compare.methods.x.foo=1", "no such setting"),
    ("+model.shape.x=1", "keys cannot be added to a setting that is null"),
    ("model.shape={a:1}", "keys cannot be added to a setting that is null"),
    # what is there already, and what cannot go
    ("+seed=1", "seed exists already; leave out the +"),
    ("+experiment=demo", "experiment exists already; leave out the +"),
    ("+strategy=hafl", "strategy exists already; leave out the +"),
    ("client@client2=sgd", "leave out the @client2"),
    *((f"~{name}", "a setting cannot be removed") for name in ("seed", "client", "model")),
    ("~client.learning_rate", "a setting cannot be removed"),
    ("~dataset.path", "a setting cannot be removed"),
    # several values
    ("seed=1,2", "add -m to run a job for each"),
    ("seed=choice(1,2)", "add -m to run a job for each"),
    ("strategy=hafl,fedit", "add -m to run a job for each"),
]


@pytest.mark.parametrize(("override", "words"), REFUSED, ids=lambda value: repr(value)[:40])
def test_is_refused_in_one_line(override, words):
    with pytest.raises(SettingsError) as caught:
        compose([override])
    message = str(caught.value)
    assert words in message
    assert not any(word in message for word in GRAMMAR)


@pytest.mark.parametrize("override", ["+nme=1", "++nme=1", "~nme", "+client.foo.bar=1"])
class TestEveryProgram:
    def test_flwr_run(self, override):
        with pytest.raises(SettingsError, match="no such setting"):
            settings_of_run({"overrides": override})

    def test_evaluate(self, override):
        with pytest.raises(SettingsError, match="no such setting"):
            read_request(["adapter=x", override])

    def test_compare(self, override, tmp_path):
        arguments = ["experiment=hafl_banking77", override]
        if "=" not in override:
            with pytest.raises(SettingsError, match="expected key=value"):
                parse_command(arguments)
            return
        with pytest.raises(SettingsError, match="no such setting"):
            Comparison.of(parse_command(arguments), tmp_path)

    def test_simulate(self, override, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        done = run_program(str(ROOT / "scripts" / "simulate.py"), override)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
        assert "no such setting" in done.stderr
        assert not list(tmp_path.iterdir())


class TestFlags:
    @pytest.mark.parametrize(
        "arguments",
        [["--config-name", "x"], ["-cn=x"], ["-cd", "/x"], ["-cp", "/x"], ["--config-dir=/x"]],
        ids=lambda value: value[0],
    )
    def test_other_files_of_settings_are_refused(self, arguments):
        with pytest.raises(SettingsError, match="come from conf/ and from overrides alone"):
            CommandLine.of(arguments)

    @pytest.mark.parametrize("arguments", [["--bogus"], ["--cfg", "nope"], ["-c"]], ids=str)
    def test_what_hydra_does_not_know_is_one_line(self, arguments):
        with pytest.raises(SettingsError, match="--hydra-help lists the flags"):
            CommandLine.of(arguments)

    @pytest.mark.parametrize(
        ("arguments", "shows"),
        [
            (["-h"], "settings"),
            (["seed=1", "--cfg", "job", "engine=ray"], "settings"),
            (["-i"], "settings"),
            (["-sc", "install=bash"], "hydra"),
            (["--hydra-help"], "hydra"),
            (["seed=1"], ""),
        ],
        ids=str,
    )
    def test_what_is_shown_instead_of_a_run(self, arguments, shows):
        assert CommandLine.of(arguments).shows == shows

    def test_flags_may_stand_between_overrides(self):
        line = CommandLine.of(["seed=0,1", "-m", "engine=inprocess"])
        assert line.multirun
        assert line.jobs() == [["seed=0", "engine=inprocess"], ["seed=1", "engine=inprocess"]]

    @pytest.mark.parametrize("override", ["hydra.foo=1", "hydra/launcher=nope"])
    def test_hydras_own_settings_are_checked_too(self, override):
        with pytest.raises(SettingsError) as caught:
            CommandLine.of([override]).jobs()
        assert str(caught.value).startswith(f"{override}: ")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["two words", "it's", "a=b", "a(b", "latest"])
def test_a_text_is_meant_with_and_without_quotes(text):
    assert unquoted(quoted(text)) == text
    assert unquoted(text) == text
