"""The kernels in Triton as Triton's own compiler turns them into machine code for GPUs that are not there.

The interpreter, by which the other tests run them, forgives what the compiler does not: types, shapes, constants. The
launches are those of steps on the simulated device, and what the code for a block reads and writes is counted in it. Run by
`test_triton_compiles`, in a process where Triton is not told to interpret.
"""

import re
from typing import Any

import pytest
import torch
import triton

from momo_hf.optim import Momo, MomoAdam, kernels
from momo_hf.optim.kernels import launch, multi_tensor, triton_model, triton_passes
from tests.optim.simulated_device import Device, device
from tests.optim.test_device_cost import stepper


__all__ = ["device"]  # a fixture
SHAPES = [(64, 40), (128,)]
THREADS = 128
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64", torch.bool: "i1"}
to_triton = multi_tensor.triton_dtype


@pytest.fixture
def launches(device: Device, monkeypatch, tmp_path):
    """Every launch from here on, as kernel, arguments and constants."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(kernels, "triton_passes", triton_passes)
    monkeypatch.setattr(kernels, "triton_model", triton_model)
    monkeypatch.setattr(multi_tensor, "triton_dtype", to_triton)
    made = []
    monkeypatch.setattr(launch, "launch", lambda kernel, programs, *a, **k: made.append((kernel, a, k)))
    return made


def machine_code(kernel: Any, arguments: tuple, constants: dict[str, Any], capability: int) -> str:
    """PTX that ptxas has taken."""
    names = kernel.arg_names

    def kind(value):
        if isinstance(value, torch.Tensor):
            return "*" + TYPES[value.dtype]
        return "fp32" if isinstance(value, float) else "i32"

    signature = dict(zip(names, map(kind, arguments))) | dict.fromkeys(constants, "constexpr")
    source = triton.compiler.ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()})
    built = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", capability, 32))
    assert built.asm["cubin"]
    return built.asm["ptx"]


def elements(code: str, access: str) -> int:
    """How many elements of 4 bytes a block of threads reads ("ld") or writes ("st") in 16 bytes at a time."""
    return THREADS * 4 * len(re.findall(rf"\b{access}\.global(?:\.\w+)*\.v4\.[bf]32", code))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("cls", [Momo, MomoAdam])
@pytest.mark.parametrize("clipped", [True, False])
def test_every_launch_compiles_and_reads_and_writes_what_the_table_says(
    device: Device, launches, cls, clipped, capability
):
    block, adam = triton_passes.BLOCK, cls is MomoAdam
    for options in ({"use_fstar": True}, {"divide": False} if adam else {}):
        params = device.parameters(SHAPES)
        groups = [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:], "lr": 0.5}]
        stepper(cls, groups, clipped, **options)
    names = set()
    for kernel, arguments, constants in launches:
        code, name = machine_code(kernel, arguments, constants, capability), kernel.fn.__name__
        names.add(name)
        if name == "first_pass":
            assert constants["known"] and constants["aligned"]  # if not clipped, one process looks at the norms
            assert elements(code, "ld") == block * (2 + adam + constants["decays"])
            assert elements(code, "st") == block * (1 + adam)
        elif name == "second_pass":
            assert elements(code, "ld") == block * (2 + adam)
            assert elements(code, "st") == block
    assert names == {"begin", "first_pass", "second_pass", "next_step"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_types_and_tensors_that_are_not_aligned_compile(device: Device, launches, dtype):
    """Those that are not aligned have a launch of their own."""
    stepper(MomoAdam, device.parameters([(2,), *SHAPES], dtype), clipped=True)
    passes = [made for made in launches if "aligned" in made[2]]
    assert [constants["aligned"] for _, _, constants in passes] == 2 * [True, False]
    for kernel, arguments, constants in passes:
        assert machine_code(kernel, arguments, constants, 90)


def test_nobody_knows_whether_the_gradients_are_finite(device: Device, launches, monkeypatch):
    """As where other processes hold parts of them."""
    monkeypatch.setattr(MomoAdam, "_norm", staticmethod(lambda *a: None))
    stepper(MomoAdam, device.parameters(SHAPES), clipped=False)
    block = triton_passes.BLOCK
    first, second = (machine_code(*made, 90) for made in launches if "aligned" in made[2])
    assert (elements(first, "ld"), elements(first, "st")) == (3 * block, 0)
    assert (elements(second, "ld"), elements(second, "st")) == (4 * block, 3 * block)
