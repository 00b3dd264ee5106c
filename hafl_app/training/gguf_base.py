"""Base models in a GGUF file: read once, and kept as a folder that Transformers reads.

GGUF is llama.cpp's format: one file with weights, vocabulary and chat template. Transformers
reads it with the package `gguf`, but anew for every model, in some twenty seconds. Here it is read
once, and kept in float32: the very numbers that the file stands for.
"""

import contextlib
import io
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from filelock import FileLock

from hafl_app.kept import cache_folder
from hafl_app.packages import is_installed, missing
from hafl_app.training.weights_file import ModelError, check_sha256, sha256_of

SUFFIX: Final = ".gguf"
_ORIGIN_FILE: Final = "gguf.json"
_WEIGHTS_FILE: Final = "model.safetensors"
_VERSION: Final = 1  # of the folder's content


@dataclass(frozen=True)
class GgufOrigin:
    """Where the weights of a base model come from.

    Parameters
    ----------
    file
        Name of the GGUF file.
    types
        Its types of tensors below 16 bits, the most frequent first, such as ``Q4_1``.
    model_sha256
        SHA-256 of the weights that were made of it.
    """

    file: str
    types: tuple[str, ...]
    model_sha256: str

    @property
    def title(self) -> str:
        """The file and what its weights went through, for people."""
        if not self.types:
            return f"read from {self.file}"
        bits = sorted({int(found[0]) for name in self.types if (found := re.findall(r"\d+", name))})
        words = " and ".join(map(str, bits))
        return f"read from {self.file}: they went through {words} bits ({', '.join(self.types)})"


def kept_folder(file: Path) -> Path | None:
    """Return the folder that was made of a GGUF file; None if there is none, or it is damaged."""
    folder = _place(file)
    origin = origin_of(folder)
    if origin is None:
        return None
    try:
        check_sha256(folder / _WEIGHTS_FILE, origin.model_sha256)
    except (ModelError, OSError):
        return None
    return folder


def origin_of(folder: Path) -> GgufOrigin | None:
    """Return the GGUF file that a folder was made of; None for any other folder."""
    try:
        facts = json.loads((folder / _ORIGIN_FILE).read_text(encoding="utf-8"))
        return GgufOrigin(str(facts["file"]), tuple(facts["types"]), str(facts["model_sha256"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def require_reader(file: Path) -> None:
    """Refuse a GGUF file if the package that reads it is missing.

    Raises
    ------
    hafl_app.training.weights_file.ModelError
    """
    if not is_installed("gguf"):
        raise ModelError(missing("gguf", f"the base model's file {file.name}"))


def read(file: Path, name: str) -> Path:
    """Read a GGUF file into a folder of its own, which appears whole or not at all.

    Parameters
    ----------
    name
        The model's name in the folder's configuration.

    Raises
    ------
    hafl_app.training.weights_file.ModelError
        If the package `gguf` is missing, the file is none of a language model, or the folder
        cannot be written.
    """
    require_reader(file)
    place = _place(file)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{place}.lock"):
            if (found := kept_folder(file)) is not None:  # another process was faster
                return found
            with _scratch(place) as scratch:
                _convert(file, name, scratch)
                shutil.rmtree(place, ignore_errors=True)
                scratch.replace(place)
    except OSError as error:
        reason = error.strerror or str(error).partition("\n")[0]
        raise ModelError(
            f"{file.name} cannot be kept as a folder in {place.parent} ({reason}); "
            "HAFL_CACHE=FOLDER names another"
        ) from error
    return place


def _place(file: Path) -> Path:
    return cache_folder() / "models" / f"{file.stem}-{sha256_of(file)[:16]}-{_VERSION}"


@contextlib.contextmanager
def _scratch(place: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _convert(file: Path, name: str, folder: Path) -> None:
    from gguf import GGUFReader  # noqa: PLC0415  optional

    try:
        reader = GGUFReader(file)
        _write_model(file, name, folder)
    except (ValueError, KeyError, TypeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise ModelError(f"{file.name}: not a language model in GGUF ({reason})") from error
    license_id = _field(reader, "general.license")
    (folder / "README.md").write_text(
        (f"---\nlicense: {json.dumps(license_id)}\n---\n\n" if license_id else "")
        + f"{name}, read from {file.name}.\n",
        encoding="utf-8",
    )
    weights = folder / _WEIGHTS_FILE
    origin = GgufOrigin(file.name, _rounded_types(reader), sha256_of(weights))
    (folder / _ORIGIN_FILE).write_text(json.dumps(asdict(origin), indent=2) + "\n")


def _write_model(file: Path, name: str, folder: Path) -> None:
    # Torch and Transformers only here: a model that is not there is reported without them.
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    from hafl_app.training.quiet_transformers import quiet_transformers  # noqa: PLC0415
    from hafl_app.training.tensor_files import write_tensors  # noqa: PLC0415

    # Its own bar goes to standard error whatever the log level. On the CPU: who asks for
    # shapes alone does so on the meta device.
    with torch.device("cpu"), quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        model: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # Not model.save_pretrained, which takes the model for a quantized one.
    tied = set(model.all_tied_weights_keys)
    tensors = {k: v for k, v in model.state_dict().items() if k not in tied}
    write_tensors(folder / _WEIGHTS_FILE, tensors, {"format": "pt"})
    (folder / _WEIGHTS_FILE).chmod(0o644)  # the cache may be one of several users
    config = model.config
    del config.quantization_config
    vars(config).pop("_model_name_or_path", None)  # the file's own title, no name on the hub
    config.name_or_path, config.architectures = name, [type(model).__name__]
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _rounded_types(reader: Any) -> tuple[str, ...]:
    counts: dict[str, int] = {}
    for tensor in reader.tensors:
        counts[tensor.tensor_type.name] = counts.get(tensor.tensor_type.name, 0) + 1
    whole = {"F64", "F32", "F16", "BF16"}
    return tuple(sorted(counts.keys() - whole, key=lambda kind: (-counts[kind], kind)))


def _field(reader: Any, name: str) -> str | None:
    field = reader.get_field(name)
    return None if field is None else str(field.contents())
