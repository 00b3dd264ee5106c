"""`hafl export`: a run's adapter for others to use, with a model card."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hafl_app.cli import run_script
from hafl_app.printable import printable

if TYPE_CHECKING:
    from hafl_app.publishing.export import Written


def main(
    source: Path, output: Path, ranks: Sequence[int], push: str | None, public: bool, **how: Any
) -> int:
    """Export, and upload if asked to; return the exit code.

    Parameters
    ----------
    source
        Folder of a run, or of an adapter.
    output
        New folder.
    ranks
        Ranks to cut to; empty: the adapter as it is.
    push
        Repository on the hub; None: nothing is uploaded.
    public
        Whether what is uploaded is for all to see.
    how
        Other fields of `hafl_app.publishing.export.ExportRequest`.
    """
    return run_script(lambda: _export(source, output, ranks, push, public, how))


def _export(
    source: Path,
    output: Path,
    ranks: Sequence[int],
    push: str | None,
    public: bool,
    how: dict[str, Any],
) -> int:
    from hafl_app.training.adapter_card import adapter_folder, read_card  # noqa: PLC0415

    if public and not push:
        raise ValueError("--public: nothing is uploaded without --push USER/NAME")
    read_card(adapter_folder(source))
    # They take seconds: not before a typo.
    from hafl_app.publishing.export import ExportRequest, export_adapter  # noqa: PLC0415
    from hafl_app.publishing.push import check_push, push_folder  # noqa: PLC0415

    request = ExportRequest(source, output, ranks=ranks, **how)
    folders = {output: str(push)}
    if ranks and not request.vllm:  # what is served side by side stays one folder
        folders = {output / f"rank-{rank}": f"{push}-rank-{rank}" for rank in ranks}
    if push:
        for repo in folders.values():
            check_push(repo)
    for written in export_adapter(request):
        print(_report(written))
    if request.vllm:
        print(f"Serve:   the command is in {output / 'README.md'}")
    for folder, repo in folders.items() if push else ():
        print(f"Pushed:  {push_folder(folder, repo, public=public)}")
    return 0


def _report(written: "Written") -> str:
    """Describe a written folder, and the loss of a cut."""
    export = written.export
    size = sum(file.stat().st_size for file in written.folder.iterdir()) / 1e6
    modules = len(export.stored.adapter.modules)
    lines = [f"Written: {written.folder} ({size:.3g} MB): rank {export.rank}, {modules} modules"]
    if cut := export.truncation:
        lines.append(f"         lost {cut.lost:.2%} of the squared norm; by module:")
        lines += [
            f"         {share:7.2%}  {printable(n)}"
            for n, share in sorted(cut.lost_by_module.items())
        ]
    return "\n".join(lines)
