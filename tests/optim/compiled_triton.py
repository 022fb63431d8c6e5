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

from momo_hf.optim import Momo, MomoAdam, MomoMuon, kernels
from momo_hf.optim.kernels import (
    launch,
    multi_tensor,
    triton_averaged,
    triton_model,
    triton_muon,
    triton_passes,
    triton_ramp,
    triton_search,
)
from momo_hf.optim.kernels.triton_tensors import BLOCK
from momo_hf.optim.steps import driver
from tests.optim.simulated_device import Device, device
from tests.optim.test_device_cost import stepper


__all__ = ["device"]  # a fixture
SHAPES = [(64, 40), (128,)]
THREADS = 128
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64", torch.bool: "i1"}
PASSES = {"first_pass", "second_pass"}
# What makes a step one of a kind, and its options as there may be more.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "modelled": ({}, {"use_fstar": True}),
    "averaged": ({"averaging": True}, {"averaging": 0.5}),
    "ramp": ({"lr": "auto"}, {"lr": "auto"}),
}
DECISION = {"modelled": "next_step", "averaged": "next_averaged_step", "ramp": "next_move"}
to_triton = multi_tensor.triton_dtype


@pytest.fixture
def launches(device: Device, monkeypatch, tmp_path):
    """Every launch from here on, as kernel, arguments and constants."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for module in (triton_passes, triton_averaged, triton_ramp, triton_muon, triton_model, triton_search):
        monkeypatch.setattr(kernels, module.__name__.rpartition(".")[2], module)
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


def elements(code: str, access: str, together: str = "v4") -> int:
    """How many elements of 4 bytes a block of threads reads ("ld") or writes ("st") in 16 bytes at a time; or ("v2") of 2
    bytes in 8.
    """
    return THREADS * 4 * len(re.findall(rf"\b{access}\.global(?:\.\w+)*\.{together}\.[bf]32", code))


@pytest.mark.parametrize("capability, clipped", [(80, True), (90, False)])
@pytest.mark.parametrize("cls", [Momo, MomoAdam])
@pytest.mark.parametrize("kind", ["modelled", "averaged", "ramp"])
def test_every_launch_compiles_and_reads_and_writes_what_the_table_says(
    device: Device, launches, cls, clipped, kind, capability
):
    adam = cls is MomoAdam
    common, given = KINDS[kind]
    for options in (given, common | {"divide": False} if adam else common):
        params = device.parameters(SHAPES)
        groups = [{"params": params[:1], "weight_decay": 0.1, "tables": (0,)}, {"params": params[1:]}]
        stepper(cls, groups, clipped, **options)
    names = set()
    for kernel, arguments, constants in launches:
        code, name = machine_code(kernel, arguments, constants, capability), kernel.fn.__name__
        names.add(name)
        if name not in PASSES:
            continue
        assert constants["finite_known"] and constants["aligned"]  # if not clipped, one process looks at the norms
        decays = constants.get("decays" if kind == "modelled" else "shrinks", False)
        blocks = {
            ("modelled", "first_pass"): (2 + adam + decays, 1 + adam),
            ("modelled", "second_pass"): (2 + adam, 1),
            ("averaged", "first_pass"): (2 + adam + decays, adam),
            ("averaged", "second_pass"): (3 + adam, 2),
            # With the origin, and averages that go back to 0: masked out but in two steps of a search.
            ("ramp", "first_pass"): (2 + adam, 1 + adam),
            ("ramp", "second_pass"): (3 + adam, 3 + adam),
        }[kind, name]
        assert (elements(code, "ld"), elements(code, "st")) == (blocks[0] * BLOCK, blocks[1] * BLOCK)
    assert names == {"begin", *PASSES, DECISION[kind]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["modelled", "averaged", "ramp"])
def test_other_types_and_tensors_that_are_not_aligned_compile(device: Device, launches, kind, dtype):
    """Those that are not aligned have a launch of their own."""
    stepper(MomoAdam, device.parameters([(2,), *SHAPES], dtype), clipped=True, **KINDS[kind][0])
    passes = [made for made in launches if "aligned" in made[2]]
    assert [constants["aligned"] for _, _, constants in passes] == 2 * [True, False]
    for kernel, arguments, constants in passes:
        assert machine_code(kernel, arguments, constants, 90)


@pytest.mark.parametrize(
    "kind, first, second",
    [("modelled", (3, 0), (4, 3)), ("averaged", (3, 0), (4, 3)), ("ramp", (3, 0), (5, 4))],
)
def test_nobody_knows_whether_the_gradients_are_finite(device: Device, launches, kind, first, second, monkeypatch):
    """As where other processes hold parts of them."""
    monkeypatch.setattr(driver, "is_known", lambda *given: False)
    stepper(MomoAdam, device.parameters(SHAPES), clipped=False, **KINDS[kind][0])
    codes = [machine_code(*made, 90) for made in launches if "aligned" in made[2]]
    found = [(elements(code, "ld") / BLOCK, elements(code, "st") / BLOCK) for code in codes]
    assert found == [first, second]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("kind", ["modelled", "averaged", "ramp"])
def test_matrices_of_muon(device: Device, launches, kind, known, monkeypatch):
    """X_0 and u are in bfloat16; the passes have read and written all else as they do for Momo, and the momentum too."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **given: True)
    if not known:
        monkeypatch.setattr(driver, "is_known", lambda *given: False)
    groups = [{"params": device.parameters([(64, 40), (32, 32), (3, 3)]), "method": "muon", "weight_decay": 0.1}]
    stepper(MomoMuon, groups, known, **KINDS[kind][0])
    found: dict[str, list[float]] = {}
    for made in launches:
        code, name = machine_code(*made, 90), made[0].fn.__name__
        if made[2].get("aligned"):
            ways = [(access, together) for together in ("v4", "v2") for access in ("ld", "st")]
            found[name] = [elements(code, *way) / BLOCK for way in ways]
    first, second = {
        "modelled": ([3, known, 1, 0], [2 + (not known), 1 + (not known), 1, 0]),
        "averaged": ([4, known, 1, 0], [2 + 2 * (not known), 2 + (not known), 1, 0]),
        "ramp": ([3, known, 1, 0], [3 + (not known), 4, 1, 0]),
    }[kind]
    expected = {"sizes": [2, 0, 0, 0], "scaled": [2, 0, 0, 1], "first_pass": first, "second_pass": second}
    assert found == expected


def test_parameters_that_join_a_running_average_compile(device: Device, launches):
    params = device.parameters(SHAPES)
    optimizer, step = stepper(MomoAdam, params[:1], clipped=True, averaging=True)
    optimizer.add_param_group({"params": params[1:]})
    step()
    late = [made for made in launches if made[2].get("late")]
    assert len(late) == 1 and machine_code(*late[0], 90)
