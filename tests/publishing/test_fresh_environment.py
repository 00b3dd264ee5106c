"""An exported adapter in an environment that has PEFT and nothing of this project."""

import json
import subprocess
import sys

import pytest
import torch
from publishing_factories import (
    IDS,
    MASK,
    adapter_for,
    llama_base,
    log_likelihoods,
    save_run,
    spec_of,
)

from hafl_app.publishing.export import ExportRequest, export_adapter
from hafl_app.training.adapter_files import load_adapter

SCRIPT = """
import json, sys

sys.modules["hafl_app"] = None  # not installed: importing it fails
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, folder, ids, mask = json.loads(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(base)
if folder:
    model = PeftModel.from_pretrained(model, folder)
ids, mask = torch.tensor(ids), torch.tensor(mask)
with torch.no_grad():
    logits = model.eval()(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
picked = logits.gather(-1, ids[:, 1:, None]).squeeze(-1)
print(json.dumps((picked * mask[:, 1:]).sum(1).tolist()))
"""


def by_peft(base, folder) -> torch.Tensor:
    given = json.dumps([str(base), folder and str(folder), IDS.tolist(), MASK.tolist()])
    command = [sys.executable, "-I", "-c", SCRIPT, given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.tensor(json.loads(done.stdout))


@pytest.mark.slow
def test_the_log_likelihoods_are_those_of_this_projects_model(tmp_path):
    base = llama_base(tmp_path / "llama")
    spec = spec_of("causal", base)
    run = save_run(
        tmp_path / "run", spec, adapter_for(spec.build(), lambda name: 2 + len(name) % 5)
    )
    (written,) = export_adapter(ExportRequest(run, tmp_path / "out"))

    own = log_likelihoods(load_adapter(run / "adapter").model.base)
    torch.testing.assert_close(by_peft(base, written.folder), own, rtol=0, atol=1e-4)
    assert (own - by_peft(base, None)).abs().min() > 0.01
