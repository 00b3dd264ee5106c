"""An exported adapter in an environment that has PEFT and nothing of this project."""

import pytest
import torch
from publishing_factories import (
    adapter_for,
    likelihoods_by_plain_peft,
    llama_base,
    log_likelihoods,
    save_run,
    spec_of,
)

from hafl_app.publishing.export import ExportRequest, export_adapter
from hafl_app.training.adapter_files import load_adapter


@pytest.mark.slow
def test_the_log_likelihoods_are_those_of_this_projects_model(tmp_path):
    base = llama_base(tmp_path / "llama")
    spec = spec_of("causal", base)
    adapter = adapter_for(spec.build(), lambda name: 2 + len(name) % 5)
    run = save_run(tmp_path / "run", spec, adapter)
    (written,) = export_adapter(ExportRequest(run, tmp_path / "out"))

    own = log_likelihoods(load_adapter(run / "adapter").model.base)
    by_peft = likelihoods_by_plain_peft(base, written.folder)
    torch.testing.assert_close(by_peft, own, rtol=0, atol=1e-4)
    assert (own - likelihoods_by_plain_peft(base, None)).abs().min() > 0.01
