"""Inductor's code for CUDA, written where there is no GPU (benchmarks.inductor_report): the flash case of a training step."""

from pathlib import Path

import pytest

from benchmarks.inductor_report import cli, paper_gpu

REASON = paper_gpu.why_not()


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_a_compiled_training_step_with_flash_is_the_library_and_one_kernel(tmp_path: Path):
    """And copies nothing: Dynamo would make the gradient of a Function's out contiguous in another memory order."""
    readings, _ = cli.run("flash", tmp_path)
    forward, backward = readings["StableMask"]
    flash = "aten._scaled_dot_product_flash_attention"
    assert (forward["calls"], forward["kernels"]) == ([flash, "mm"], ["remask_kernel_0"])
    assert (sorted(backward["calls"]), backward["kernels"]) == ([f"{flash}_backward", "mm", "mm"], [])
    assert (forward["copies"], forward["kept"], backward["copies"]) == (0, readings["plain"][0]["kept"], 0)
    assert not cli.faults("flash", readings)


def test_what_is_at_fault():
    """A copy more than the plain call has, a pass that the case does not need, a second out that is kept."""
    plain = {"calls": ["attention", "mm"], "kernels": [], "passes": 0, "copies": 0, "kept": 2}
    ours = plain | {"kernels": ["remask_kernel_0"], "passes": 1}

    def faults(name: str = "flash", forward: dict = ours, backward: dict = plain) -> list[str]:
        return cli.faults(name, {"StableMask": [forward, backward], "plain": [plain, plain]})

    assert not faults()
    assert faults(backward=plain | {"copies": 1}) == ["flash, backward: 1 copies, plain has 0"]
    assert faults(forward=ours | {"passes": 2})
    assert faults(forward=ours | {"kept": 3})
    assert not faults("flex, a score_mod", forward=ours | {"kept": 3})
    assert faults(backward=plain | {"calls": ["attention"]})
