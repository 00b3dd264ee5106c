"""`hafl`: its commands, their options and their help.

Each command imports what it does when it is called: a wrong name is answered at once.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from hafl_app.cli import INTERRUPTED, REFUSED
from hafl_app.commands.arguments import FOLDER, PASSED_ON, began, takes_settings
from hafl_app.commands.command_group import CommandGroup
from hafl_app.commands.figures import plots
from hafl_app.printable import printable


def main(arguments: Sequence[str] | None = None, program: Sequence[str] = ()) -> int:
    """Run a command and return its exit code; a mistake is one line.

    Parameters
    ----------
    arguments
        Of the command line, the command first; None: those of this process.
    program
        How the command began, for what is printed to be typed again; empty: with ``hafl``.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given in ([], ["plots"]):
        given.append("--help")
    try:
        code = hafl.main(_asked_for_help(given), "hafl", standalone_mode=False, obj=program)
    except click.Abort:
        return INTERRUPTED
    except click.ClickException as error:
        print(f"error: {printable(error.format_message(), 2000)}", file=sys.stderr)
        return REFUSED
    return int(code or 0)


def _asked_for_help(arguments: list[str]) -> list[str]:
    """Read ``help`` as ``--help``, alone, before a command or after one."""
    if "help" not in arguments[:2] or len(arguments) > 2:
        return arguments
    return [*(word for word in arguments if word != "help"), "--help"]


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
def hafl() -> None:
    """Federated LoRA fine-tuning when clients differ.

    \b
      hafl simulate experiment=demo engine=inprocess
      hafl export outputs/DATE/TIME-hafl --output small --rank 2

    Settings are given as name=value, without hyphens; docs/settings.md lists all of them.
    `hafl COMMAND --help` explains a command. Completion in the shell, bash for example:
    eval "$(_HAFL_COMPLETE=bash_source hafl)"
    """


@hafl.command(context_settings=PASSED_ON)
@takes_settings
@click.pass_context
def simulate(context: click.Context, arguments: tuple[str, ...]) -> int:
    """Run a federation on this machine, or with -m a sweep of several.

    \b
      hafl simulate experiment=demo engine=inprocess strategy=flexlora seed=1
      hafl simulate -m experiment=demo engine=inprocess strategy=hafl,flexlora
      hafl simulate resume=latest

    \b
    strategy=NAME            aggregation method (hafl)
    model=encoder model.path=NAME
                             base model, a hub name or a folder (MiniLM)
    dataset=local dataset.path=FILE
                             your own csv, tsv, json or parquet (generated text)
    partition=dirichlet      how the data are shared out (iid)
    ranks=NAME               rank budgets of the clients (haflq)
    federation.num_clients=8, federation.num_rounds=5
    client.learning_rate=1e-3, client.local_epochs=1, client.batch_size=32
    engine=inprocess         this process; ray: Flower's simulation (ray)
    output_dir=FOLDER        results (outputs/DATE/TIME-STRATEGY)
    resume=FOLDER            go on with a run that stopped; or latest

    All settings as they are: --cfg job. All of Hydra's flags: --hydra-help.
    """
    from hafl_app.commands.simulate import main as run  # noqa: PLC0415

    return run(arguments, began(context))


@hafl.command(context_settings=PASSED_ON)
@takes_settings
@click.pass_context
def compare(context: click.Context, arguments: tuple[str, ...]) -> int:
    """Compare methods on identical partitions and budgets.

    One table and one figure, of as many seeds as are given.

    \b
      hafl compare methods=hafl,hetlora seeds=0,1 dataset=local dataset.path=a.csv
      hafl compare experiment=hafl_banking77 seeds=0,1,2

    \b
    methods=hafl,hafl:scheme=truncation
                             strategies, also with settings of their own; first
                             the baseline
    experiment=NAME          or a file with the methods of the comparison
    seeds=0,1,2              one run of every method for each (0)
    workers=2                processes that train at once (1)
    tune=false               learning rates of the experiment instead of a search
    methods=a,b cells=c      with an experiment's methods: only these
    older=true               keep runs without a setting that has its default now
    output_dir=FOLDER        where to write; finished runs that are there are kept

    All other settings hold for every run, e.g. federation.num_rounds=5.
    """
    from hafl_app.commands.compare import main as run  # noqa: PLC0415

    return run(arguments, began(context))


@hafl.command(context_settings=PASSED_ON)
@takes_settings
def evaluate(arguments: tuple[str, ...]) -> int:
    """Score a saved adapter by itself, or a base model alone.

    \b
      hafl evaluate adapter=RUN/adapter dataset=synthetic

    \b
    adapter=FOLDER           of a run, such as RUN/adapter; none: the base model
                             that model=... names, alone
    metrics=loss             loss (with accuracy or perplexity), rouge-l,
                             exact-match; several with commas
    max_new_tokens=64        of a generated answer
    max_examples=N           rows of the test set (all)
    tasks=NAME,...           benchmarks of lm-eval, if it is installed, or YAML
                             files of your own
    output=FILE              the result as JSON

    The rest are settings as for simulate: the data set, client.device, and so on. Rows are cut
    where the adapter's training cut them; dataset.max_length=N overrides it.
    """
    from hafl_app.commands.evaluate import main as run  # noqa: PLC0415

    return run(arguments)


@hafl.command(context_settings=PASSED_ON)
@takes_settings
def devices(arguments: tuple[str, ...]) -> int:
    """Measure this machine as a class of simulated devices.

    \b
      hafl devices model=minilm client.batch_size=16 client.num_threads=2

    Prints the FLOP/s of a matrix product and of training steps, in the form of a file of
    conf/devices: for a --config-dir of your own, once you know the connection's bandwidth. The
    settings are those of simulate: model, lora.max_rank, dataset.max_length, client.
    """
    from hafl_app.commands.devices import main as run  # noqa: PLC0415

    return run(arguments)


@hafl.command()
@click.argument("source", metavar="RUN", type=FOLDER)
@click.argument("further_ranks", nargs=-1, metavar="", type=int)
@click.option("--output", required=True, metavar="DIR", type=FOLDER, help="New folder.")
@click.option("--rank", multiple=True, type=int, help="Cut to this rank; several: --rank 4 8.")
@click.option("--merge", is_flag=True, help="Write a whole model, base and adapter in one.")
@click.option("--gguf", is_flag=True, help="Write an adapter for llama.cpp.")
@click.option("--vllm", is_flag=True, help="Write a folder for each rank, served side by side.")
@click.option("--dtype", help="Of merged weights (float32).")
@click.option("--base", metavar="NAME", help="The base model's name on the hub.")
@click.option("--push", metavar="USER/NAME", help="Upload to the hub with your own token.")
@click.option("--public", is_flag=True, help="For all to see (private).")
@click.option("--force", is_flag=True, help="Replace what is in DIR.")
@click.option("--trust-remote-code", is_flag=True, help="Run the base model's own Python code.")
def export(
    source: Path,
    further_ranks: tuple[int, ...],
    output: Path,
    rank: tuple[int, ...],
    push: str | None,
    public: bool,
    **how: Any,
) -> int:
    """Export a run's adapter for others to use, with a model card.

    \b
      hafl export RUN --output DIR --rank 4 8      an adapter for each rank
      hafl export RUN --output DIR --merge         base model and adapter in one
      hafl export RUN --output DIR --gguf          an adapter for llama.cpp
      hafl export RUN --output DIR --vllm          one for each rank, for vLLM
      hafl export RUN --output DIR --push ME/NAME  as it is, on the hub

    RUN is a run's folder (its last round), or an adapter's, such as RUN/adapter-best.
    """
    from hafl_app.commands.export import main as run  # noqa: PLC0415

    if further_ranks and not rank:
        raise click.UsageError(f"{further_ranks[0]}: expected one RUN; ranks stand after --rank")
    return run(source, output, [*rank, *further_ranks], push, public, **how)


@hafl.command()
@click.argument("source", metavar="RUN", type=FOLDER)
@click.argument("prompt", required=False)
@click.option(
    "--compare", metavar="WHO,...", help="Who answers: base, adapter, ranks to cut to (adapter)."
)
@click.option(
    "--max-new-tokens",
    default=128,
    show_default=True,
    type=click.IntRange(1, 4096),
    help="Of an answer.",
)
@click.option(
    "--temperature",
    default=0.0,
    show_default=True,
    help="0: the most probable token; above, tokens are drawn.",
)
@click.option("--seed", type=click.IntRange(0, 2**32), help="Of drawn answers (0).")
@click.option("--trust-remote-code", is_flag=True, help="Run the base model's own Python code.")
def chat(source: Path, prompt: str | None, compare: str | None, **how: Any) -> int:
    """Talk to the adapter of a causal language model in the terminal.

    \b
      hafl chat RUN
      hafl chat RUN "What is a llama?" --compare base,2,8
      hafl chat RUN < prompts.txt

    RUN is a run's folder (its last round), or an adapter's, such as RUN/adapter-best. What you type
    goes into the first column of the prompt that it was trained with. With --compare the base model
    alone and the adapter at the rank of each device answer beside each other.
    """
    from hafl_app.commands.chat import main as run  # noqa: PLC0415

    return run(source, prompt, compare, **how)


@hafl.command()
@click.argument("folders", nargs=-1, required=True, metavar="DIR...", type=FOLDER)
@click.option("--output", default="report", metavar="DIR", type=FOLDER, help="Folder (report).")
@click.option("--baseline", default="", metavar="NAME", help="Runs that others are compared with.")
@click.option(
    "--figures",
    default="svg",
    type=click.Choice(["svg", "pdf", "png"]),
    help="Format of the figures' files (svg).",
)
def report(folders: tuple[Path, ...], output: Path, baseline: str, figures: str) -> int:
    """Report on runs, sweeps and comparisons.

    \b
      hafl report outputs/first outputs/second
      hafl report COMPARISON --output paper --figures pdf --baseline fedit

    DIR is the folder of a run, of a sweep or of a comparison, or one above such. Runs that differ
    in their seed alone count as one: mean and spread, and paired differences from a baseline with
    95 % intervals. It writes report.html, which needs no other file, report.md, report.tex with
    tables for booktabs, and figures/.
    """
    from hafl_app.commands.report import main as run  # noqa: PLC0415

    return run(folders, output, baseline, figures)


@hafl.command()
@click.argument("root", metavar="[FOLDER]", type=FOLDER, default="outputs")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    default=8050,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="0 takes a free one.",
)
@click.option("--name", "names", multiple=True, help="Host name that browsers ask for, beside it.")
@click.option(
    "--fleet", metavar="FILE", type=FOLDER, help="What the fence writes of the nodes (--fleet)."
)
def dashboard(root: Path, host: str, port: int, names: tuple[str, ...], fleet: Path | None) -> int:
    """Look at runs in a browser, while they go and afterwards.

    \b
      hafl dashboard outputs
      hafl dashboard outputs --fleet /var/lib/hafl/fleet.json

    Shows every run below FOLDER (outputs): state, scores of several over each other, heat maps,
    and of a deployment its nodes. It only reads, needs no network, and asks for no password: it
    listens on this machine alone unless --host says otherwise.
    """
    from hafl_app.commands.dashboard import main as run  # noqa: PLC0415

    return run(root, host, port, names, fleet)


@hafl.command()
@click.argument("root", metavar="[DIR]", type=FOLDER, default="outputs")
@click.option("--name", default="", help="Part of their name.")
@click.option("--tag", "tags", multiple=True, help="A tag that they have; several: all of them.")
@click.option("--method", default="", metavar="NAME", help="Aggregation method.")
@click.option("--data", default="", metavar="NAME", help="Data set.")
@click.option(
    "--state",
    type=click.Choice(["finished", "running", "failed", "interrupted", "stopped"]),
    default=None,
    help="How they ended, or that they go on.",
)
@click.option("--last", type=click.IntRange(min=1), metavar="N", help="Only the latest N.")
@click.option("--paths", is_flag=True, help="Their folders alone, for another command.")
def runs(
    root: Path,
    name: str,
    tags: tuple[str, ...],
    method: str,
    data: str,
    state: str | None,
    last: int | None,
    paths: bool,
) -> int:
    """List runs: when, how they ended, score, method, data, name and tags.

    \b
      hafl runs --tag paper --method flexlora
      hafl plots curves $(hafl runs --tag paper --last 2 --paths)

    Looks through DIR (outputs) at any depth. A run gets its name and tags as settings:
    hafl simulate name=first "tags=[paper,try2]"
    """
    from hafl_app.commands.runs import main as run  # noqa: PLC0415
    from hafl_app.run.run_list import RunFilter  # noqa: PLC0415

    return run(root, RunFilter(name, tags, method, data, state or ""), last, paths)


@hafl.command(context_settings=PASSED_ON)
@takes_settings
def doctor(arguments: tuple[str, ...]) -> int:
    """Check this machine and, for given settings, what a run takes on it.

    \b
      hafl doctor
      hafl doctor experiment=demo engine=inprocess

    Python, packages, torch and CUDA, Ray, Flower, a SuperLink that was left behind, ports, base
    model, hub, disk, memory, caches; with settings also whether they go together, the clients that
    train at a time, the memory, the minutes by a few steps timed now, and what to change. Ends with
    1 if something needed is broken, with 2 if a run would be refused.
    """
    from hafl_app.commands.doctor import main as run  # noqa: PLC0415

    return run(arguments)


hafl.add_command(plots)
