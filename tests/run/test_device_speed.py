"""A machine as a class of devices, on times that are given."""

from dataclasses import fields

import pytest
from omegaconf import OmegaConf
from running import TINY

from hafl_app.commands.devices import main
from hafl_app.config.compose import compose
from hafl_app.run import device_speed
from hafl_app.run.device_speed import measure_speed
from hafl_app.server.devices import DeviceClass


@pytest.fixture(autouse=True)
def _times(monkeypatch):
    def after_one_call(call, *rest):
        call()
        return [1.0, 2.0, 4.0]

    monkeypatch.setattr(device_speed, "_times", after_one_call)


def test_a_product_and_a_step_make_a_class(capsys):
    assert main([*TINY, "client.batch_size=4", "lora.max_rank=3"]) == 0

    printed = OmegaConf.create(capsys.readouterr().out).classes.this_machine
    assert set(printed) <= {field.name for field in fields(DeviceClass)}
    assert printed.peak_flops == pytest.approx(2 * 1024**3, rel=0.01)  # the fastest of them
    assert OmegaConf.is_missing(printed, "up_mbps")
    assert printed.memory_mb > 0


def test_a_step_has_the_flops_of_its_batch():
    small, large = (measure_speed(compose([*TINY, f"client.batch_size={rows}"])) for rows in (2, 6))

    assert large.step_flops == pytest.approx(3 * small.step_flops)
    assert small.steps == 3


def test_a_mistake_is_one_line(capsys):
    assert main(["client.batch_sizes=4"]) == 2
    assert capsys.readouterr().err.startswith("error: client.batch_sizes=4: no such setting")
