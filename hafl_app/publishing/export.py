"""Export a run's adapter to folders that others can use."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hafl_app.data.errors import nearest
from hafl_app.publishing.card import CARD_FILE, hub_name, is_hub_name, model_card
from hafl_app.publishing.exported import Exported, Form
from hafl_app.publishing.gguf_adapter import GGUF_FILE, GgufLayout, gguf_layout, write_gguf
from hafl_app.publishing.license import base_license
from hafl_app.publishing.merging import DTYPES, require_whole_base, write_merged
from hafl_app.publishing.output import check_output, whole_folder
from hafl_app.publishing.run_facts import read_run
from hafl_app.publishing.serving import require_served, serving_card
from hafl_app.publishing.truncation import truncate_adapter
from hafl_app.training.adapter_card import adapter_folder
from hafl_app.training.adapter_files import StoredAdapter, read_adapter, save_adapter
from hafl_app.training.peft_format import largest_rank


@dataclass(frozen=True)
class ExportRequest:
    """Request to export an adapter.

    Parameters
    ----------
    source
        An adapter's folder, or a run's, whose last round's adapter is meant.
    output
        The folder to write.
    merge
        Write the base model with the adapter in its weights.
    gguf
        Write adapters in GGUF, for llama.cpp.
    vllm
        Write a folder for each rank, with the card of a server of them all; without `ranks` for
        those of the run's devices and the adapter's own.
    ranks
        Write an adapter for each of these ranks, in ``rank-4`` and so on; empty for the whole one.
    dtype
        Of merged weights, one of `hafl_app.publishing.merging.DTYPES`; `None` is float32. An
        adapter is written in the dtype that it has.
    base
        Name on the hub that the exported files shall give the base model; `None` leaves the
        run's, which may be a folder of this machine.
    force
        Replace what is in ``output``.
    trust_remote_code
        Let the base model's repository run its own Python code.

    Raises
    ------
    ValueError
        If values do not go together.
    """

    source: Path
    output: Path
    merge: bool = False
    gguf: bool = False
    vllm: bool = False
    ranks: Sequence[int] = ()
    dtype: str | None = None
    base: str | None = None
    force: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        forms = [f"--{name}" for name in ("merge", "gguf", "vllm") if getattr(self, name)]
        if len(forms) > 1:
            raise ValueError(f"{' and '.join(forms)}: give one of them")
        if self.merge and self.ranks:
            raise ValueError("--merge and --rank: give one of them")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(
                f"--dtype {self.dtype}: expected one of {', '.join(DTYPES)}"
                f"{nearest(self.dtype, DTYPES)}"
            )
        if self.dtype is not None and not self.merge:
            raise ValueError(
                f"--dtype {self.dtype}: of merged weights, add --merge; an adapter stays as it is"
            )
        if self.base is not None and not is_hub_name(self.base):
            raise ValueError(f"--base {self.base}: expected a name on the hub, OWNER/NAME")

    @property
    def form(self) -> Form:
        """What the weights are written as."""
        return "merged" if self.merge else "gguf" if self.gguf else "peft"

    @property
    def adapter_folder(self) -> Path:
        """The adapter's own folder."""
        return adapter_folder(self.source)


@dataclass(frozen=True)
class Written:
    """Written folder, with its content."""

    folder: Path
    export: Exported


def export_adapter(request: ExportRequest) -> list[Written]:
    """Write what a request asks for: all of it, or nothing.

    Raises
    ------
    ValueError
        If the source is no saved adapter, a rank is above its own, the base model is not there, or
        the output is taken.
    """
    output = request.output.expanduser().resolve()
    check_output(output, request.adapter_folder, force=request.force)
    stored = read_adapter(request.adapter_folder, trust_remote_code=request.trust_remote_code)
    if request.vllm:
        require_served(stored, max(request.ranks, default=largest_rank(stored.adapter)))
    exports = list(_exports(request, stored, output.name))
    layout = gguf_layout(stored) if request.gguf else None
    if request.form == "peft":
        require_whole_base(stored.spec.base, stored.spec.num_labels)
    many = bool(request.ranks) or request.vllm
    with whole_folder(output) as scratch:
        for export in exports:
            folder = scratch / export.name if many else scratch
            folder.mkdir(exist_ok=True)
            _write(folder, export, request, layout)
        if request.vllm:
            _write_serving_card(scratch / CARD_FILE, exports, request)
    return [Written(output / e.name if many else output, e) for e in exports]


def _exports(request: ExportRequest, stored: StoredAdapter, name: str) -> Iterator[Exported]:
    run = read_run(request.adapter_folder)
    ranks = sorted(set(request.ranks))
    if request.vllm and not ranks:
        largest = largest_rank(stored.adapter)
        ranks = [*(rank for rank in run.clients_by_rank if rank < largest), largest]
    if not ranks:
        yield Exported(name, stored, run, request.form)
    for rank in ranks:
        cut = truncate_adapter(stored.adapter, rank)
        facts = {**stored.facts, "truncation": {"rank": rank, "lost": cut.lost}}
        adapter = cut.adapter.with_head(stored.head_at(rank))
        cut_stored = replace(stored, adapter=adapter, facts=facts, heads_by_rank={})
        yield Exported(f"rank-{rank}", cut_stored, run, request.form, cut)


def _write(
    folder: Path, export: Exported, request: ExportRequest, layout: GgufLayout | None
) -> None:
    named = _named(export, request.base)
    stored = named.stored
    if export.merged:
        # Its weights are where the run had them, whatever others shall call it.
        write_merged(folder, export.stored, request.dtype or "float32")
    elif layout is not None:
        write_gguf(folder / GGUF_FILE, stored, layout, export.name)
    else:
        save_adapter(
            folder,
            stored.adapter,
            stored.spec,
            label_names=stored.label_names,
            max_length=stored.max_length,
            facts=stored.facts,
            heads_by_rank=stored.heads_by_rank,
        )
    model_card(named, _license(export, named)).save(folder / CARD_FILE)


def _write_serving_card(file: Path, exports: Sequence[Exported], request: ExportRequest) -> None:
    named = [_named(export, request.base) for export in exports]
    base = named[0].stored.spec.base
    file.write_text(serving_card(named, hub_name(base), _license(exports[0], named[0])))


def _license(*exports: Exported) -> str | None:
    """Return the license of the first card that states one."""
    found = (base_license(export.stored.spec.base, ask_hub=True) for export in exports)
    return next((one for one in found if one), None)


def _named(export: Exported, base: str | None) -> Exported:
    if base is None:
        return export
    spec = export.stored.spec
    renamed = replace(spec, base=replace(spec.base, path=base))  # type: ignore[type-var]
    return replace(export, stored=replace(export.stored, spec=renamed))
