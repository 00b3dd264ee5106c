"""`hafl devices`: measure this machine as a class of simulated devices."""

from collections.abc import Sequence

from hafl_app.cli import run_script
from hafl_app.config.compose import compose


def main(overrides: Sequence[str]) -> int:
    """Print a class of devices in the form of a file of `conf/devices`."""
    return run_script(lambda: _measure(overrides))


def _measure(overrides: Sequence[str]) -> int:
    settings = compose(overrides)
    # Only now: a typo is answered without torch.
    from hafl_app.run.device_speed import measure_speed  # noqa: PLC0415

    speed, client = measure_speed(settings), settings.client
    lines = [
        f"# {speed.device}, {speed.precision}, {client.num_threads} threads",
        "classes:",
        "  this_machine:",
        f"    peak_flops: {speed.gemm_flops:.3g} # the fastest product of two 1024 x 1024 matrices",
        f"    reached: {speed.step_flops / speed.gemm_flops:.2g} # {speed.step_flops:.3g} FLOP/s, "
        f"median of {speed.steps} training steps of {settings.model.title}",
        f"    memory_mb: {speed.memory_mb:.0f}",
        "    down_mbps: ??? # of its connection; this command measures none",
        "    up_mbps: ???",
    ]
    print("\n".join(lines))
    return 0
