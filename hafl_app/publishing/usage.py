"""Code that uses an exported folder without this project; the tests run it as it is printed."""

import json
from pathlib import Path
from typing import Final

from hafl_app.printable import markdown_text, python_text
from hafl_app.publishing.gguf_adapter import GGUF_FILE
from hafl_app.training.adapter_files import StoredAdapter
from hafl_app.training.base_model import IMAGE_CLASSIFICATION
from hafl_app.training.peft_format import task_type
from hafl_app.training.settings import BaseSpec

_AUTO: Final = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "FEATURE_EXTRACTION": "AutoModel",
    "IMAGE_CLS": "AutoModelForImageClassification",
}

_GENERATE: Final = """
prompt = {prompt}
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
with torch.no_grad():
    output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""

_TOKENIZE: Final = """
texts = ["a text", "another one, a little longer"]
inputs = tokenizer(
    texts, truncation=True, max_length={max_length}, padding=True, return_tensors="pt"
)
"""

_CLASSIFY: Final = """with torch.no_grad():
    logits = model(**inputs).logits
print([labels[i] for i in logits.argmax(1).tolist()])
"""

_POOL: Final = """head = load_file(f"{folder}/head.safetensors")
with torch.no_grad():
    hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    pooled = (hidden * mask).sum(1) / mask.sum(1)  # the mean over the tokens
    logits = torch.nn.functional.linear(pooled, head["weight"], head["bias"])
print([labels[i] for i in logits.argmax(1).tolist()])
"""

_OWN: Final = """from hafl_app.training.adapter_files import load_adapter

loaded = load_adapter({name})
"""

_GGUF: Final = """```bash
llama-server -m BASE.gguf --lora {file}
```

`BASE.gguf` is {base} in GGUF, as llama.cpp's `convert_hf_to_gguf.py` makes it."""

_NO_TOKENIZER: Final = """from transformers import {auto}

model = {auto}.from_pretrained({name}).eval()  # for tests: there is no tokenizer
"""


def base_name(base: BaseSpec) -> str:
    """Return the name of a base model: on the hub, or of its folder."""
    path = Path(base.path).expanduser()
    return path.resolve().name if base.path and path.is_dir() else base.path


def base_title(base: BaseSpec) -> str:
    """Return a base model's name for people: it says so if the weights are random."""
    name = base_name(base) or "a built-in model"
    return f"{name} with random weights" if base.random_weights else name


def kind_of(base: BaseSpec) -> str:
    """Return PEFT's name of what a model does, or ``IMAGE_CLS``, for which it has none."""
    return "IMAGE_CLS" if base.task == IMAGE_CLASSIFICATION else task_type(base)


def usage(stored: StoredAdapter, folder: str, *, merged: bool, template: str | None) -> str:
    """Return Python code that loads an export and uses it.

    Parameters
    ----------
    folder
        Name of the exported folder.
    merged
        Whether the folder holds a whole model, and not an adapter.
    template
        Prompt of a causal language model, with column names in braces; `None` if not known.
    """
    base = stored.spec.base
    if base.random_weights and not merged:
        return _OWN.format(name=python_text(folder))
    kind = kind_of(base)
    if base.is_without_files:
        return _NO_TOKENIZER.format(auto=_AUTO[kind], name=python_text(folder))
    names = f"folder = {python_text(folder)}  # this folder\n"
    if not merged:
        names += f"base = {python_text(base_name(base))}  # on the hub, or a folder\n"
        names += f"revision = {python_text(base.revision)}\n" if base.revision else ""
    load = _load_merged(base) if merged else _load_adapter(stored)
    if kind == "CAUSAL_LM":
        prompt = python_text(template) if template else '"Once upon a time"'
        body = _GENERATE.format(prompt=prompt)
    else:
        body = _TOKENIZE.format(max_length=stored.max_length)
        body += _labels(merged=merged) + (_CLASSIFY if kind == "SEQ_CLS" else _POOL)
    return f"{_imports(kind, merged=merged)}\n{names}{load}{body}"


def gguf_usage(base: BaseSpec, template: str | None) -> str:
    """Return the command that runs an adapter in GGUF, what it needs, and its prompt as JSON."""
    text = _GGUF.format(file=GGUF_FILE, base=markdown_text(base_title(base)))
    if template:
        text += f"\n\n```json\n{json.dumps({'prompt': template})}\n```"
    return text


def _imports(kind: str, *, merged: bool) -> str:
    standard = "" if merged or kind == "CAUSAL_LM" else "import json\n\n"
    lines = ["import torch"]
    lines += [] if merged else ["from peft import PeftModel"]
    lines += ["from safetensors.torch import load_file"] if kind == "FEATURE_EXTRACTION" else []
    lines += [f"from transformers import {_AUTO[kind]}, AutoTokenizer"]
    return standard + "\n".join(lines) + "\n"


def _load_merged(base: BaseSpec) -> str:
    code = ", trust_remote_code=True" if base.trust_remote_code else ""
    return (
        f"tokenizer = AutoTokenizer.from_pretrained(folder{code})\n"
        f"model = {_AUTO[task_type(base)]}.from_pretrained(folder{code}).eval()\n"
    )


def _load_adapter(stored: StoredAdapter) -> str:
    base = stored.spec.base
    where = ", revision=revision" if base.revision else ""
    where += ", trust_remote_code=True" if base.trust_remote_code else ""
    cut = f", num_hidden_layers={base.num_layers}" if base.num_layers else ""
    classes = f", num_labels={stored.spec.num_labels}" if task_type(base) == "SEQ_CLS" else ""
    return (
        f"tokenizer = AutoTokenizer.from_pretrained(base{where})\n"
        f"model = {_AUTO[task_type(base)]}.from_pretrained(base{where}{cut}{classes})\n"
        "model = PeftModel.from_pretrained(model, folder).eval()\n"
    )


def _labels(*, merged: bool) -> str:
    if merged:
        return "labels = model.config.id2label\n"
    return (
        'with open(f"{folder}/hafl.json") as file:\n    labels = json.load(file)["label_names"]\n'
    )
