"""The kernels in Triton, run by Triton's interpreter, against the plain passes; and what they read and write."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from momo_hf.optim import Momo, MomoAdam
from momo_hf.optim.kernels import launch, table
from momo_hf.optim.kernels.multi_tensor import MultiTensor, MultiTensorAveraged, MultiTensorModelled, MultiTensorRamp
from momo_hf.optim.kernels.plain import Plain
from momo_hf.optim.steps.averaged import Averaged
from momo_hf.optim.steps.averaged_model import AveragedStep
from momo_hf.optim.steps.driver import now_of
from momo_hf.optim.steps.given import Beginning
from momo_hf.optim.steps.kind import Kind
from momo_hf.optim.steps.model import Step
from momo_hf.optim.steps.modelled import Modelled
from momo_hf.optim.steps.ramp import Ramp
from momo_hf.optim.steps.search import Move
from momo_hf.optim.tensors.buckets import Bucket


pytest.importorskip("triton")
BOTH = pytest.mark.parametrize("cls", [Momo, MomoAdam])
SETS = {Modelled: MultiTensorModelled, Averaged: MultiTensorAveraged, Ramp: MultiTensorRamp}


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    """The kernels run on the CPU, in small blocks."""
    with pytest.MonkeyPatch.context() as patch:
        from momo_hf.optim.kernels import triton_tensors

        patch.setattr(triton_tensors, "BLOCK", 64)
        patch.setattr(launch, "runs_on", lambda device: True)
        yield


def bucket(kind, method, shapes, stored, seed, bad=None, start=None, tables=False, **group: Any) -> Bucket:
    """Parameters of the second group, with random values in all roles of a kind of step."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(stored, torch.float32)
    roles: dict[str, list[torch.Tensor]] = {}
    for role in ("param", "grad", *kind.roles(method)):
        dtype = stored if role in ("param", "grad") else wide
        values = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        last = [v.dim() == 4 and not method.whole for v in values]
        roles[role] = [v.to(memory_format=torch.channels_last) if to else v for v, to in zip(values, last)]
    for tensor in roles.get("exp_avg_sq", []):
        tensor.square_()
    if kind is Averaged:  # the parameter is y, rounded
        roles["param"] = [y.to(stored) for y in roles["y"]]  # the same tensor where nothing rounds
    if bad is not None:
        roles["grad"][0].select(-1, 0).fill_(bad) if shapes[0] else roles["grad"][0].fill_(bad)
    options = {"betas": (0.9, 0.99), "eps": 1e-8} if method.buffers else {}
    averaging = 0.8 if kind is Averaged else False
    group = {"foreach": None, "compile": False, "averaging": averaging, "averaging_power": 3, "beta": 0.9, **group}
    return Bucket(1, group, method, options, None, tables, True, start, roles)


def passes(kernel_set, kind: type[Kind], made: Bucket, beginning: Beginning, known, update):
    """Both passes, and what they returned."""
    kernel = kernel_set(kind, made, now_of(kind, kernel_set, made, beginning, known))
    return kernel.first(), kernel.second(kernel.numbers(update))


def update_of(kind, ok: bool, move: str):
    """A step that might have been decided on."""
    good = torch.tensor(ok)
    if kind is Ramp:
        back = torch.tensor(move == "back")
        return Move(torch.tensor(0.3), good & ~back, back, torch.tensor(move == "begin"))
    factor, decay = (torch.tensor([9.0, value if ok else 0.0]) for value in (0.3, 0.01))
    return Step(factor, decay, good) if kind is Modelled else AveragedStep(factor, decay, torch.tensor(0.2 * ok), good)


@BOTH
@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("known", [True, False])
@settings(max_examples=12, deadline=None)
@given(
    shapes=st.lists(
        st.sampled_from([(3,), (5, 4), (20, 10), (64,), (65,), (), (0,), (5, 4, 3, 2)]), min_size=1, max_size=6
    ),
    stored=st.sampled_from(
        [torch.float32, torch.float16]
    ),  # to bfloat16 the interpreter cuts off where a device rounds
    step=st.integers(1, 300),
    late=st.booleans(),
    seed=st.integers(0, 999),
    bad=st.sampled_from([None, None, float("nan"), float("inf")]),
    move=st.sampled_from(["step", "begin", "back"]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    divide=st.booleans(),
    bias_correction=st.booleans(),
    averaging_power=st.sampled_from([1, 3]),
    tables=st.booleans(),
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy computes what a device leaves out
def test_they_do_what_the_plain_passes_do(cls, kind, known, shapes, stored, step, late, seed, bad, move, **group):
    if bad is not None and shapes[0] == (0,):
        return
    start = torch.tensor(3.0) if late else None
    ours, plain = (bucket(kind, *cls.methods.values(), shapes, stored, seed, bad, start, **group) for _ in range(2))
    assert len(SETS[kind].take(ours, known)[0].roles["param"]) == len(shapes)
    compare(SETS[kind], kind, known, ours, plain, step, late, bad is None, move, 2e-4)


def compare(kernel_set, kind, known, ours, plain, step, late, ok, move, close):
    """A set and the plain one on two equal buckets: what they find, what they write, and that nothing is where it is bad."""
    group, stored = ours.group, ours.stored
    before = [t.clone() for tensors in ours.roles.values() for t in tensors]
    weight = 1.0 if step == 1 and not group["bias_correction"] else 0.1
    beginning = Beginning(torch.tensor(step + 3.0 * late), torch.tensor(weight), torch.tensor(ok))
    update = update_of(kind, ok, move)
    found = passes(kernel_set, kind, ours, beginning, known, update)
    expected = passes(Plain, kind, plain, beginning, known, update)
    turned = 2**-10 if stored is torch.float16 else 0.0
    if ok:  # the first step of a search has no slope
        sums = slice(1 if kind is Ramp and step == 1 else 0, None)
        size = 1.0 + sum(t.numel() for t in ours.roles["param"])
        for x, y in ((found[0][sums], expected[0][sums]), (found[1], expected[1])):
            torch.testing.assert_close(x, y, rtol=close, atol=size * (close / 10 + turned / 8))
    elif not known:
        assert not found[0].isfinite().all()
    for role, tensors in ours.roles.items():
        for x, y in zip(tensors, plain.roles[role]):
            torch.testing.assert_close(x, y, equal_nan=True, rtol=close + turned * (role == "param"), atol=close)
    if not ok and not (kind is Ramp and move != "step"):
        for x, y in zip([t for tensors in ours.roles.values() for t in tensors], before):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def run(cls, steps=8, **options):
    """Some steps, with gradients that are missing, and a parameter that is a view of another shape."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(7, 9), (130,), (4, 5)]
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    params.append(nn.Parameter(torch.randn(6, 8, generator=generator).t()))
    optimizer = cls(params, **options)
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=generator) if (i, step) != (1, 3) and step >= i else None
        if step == 5:
            params[0].grad[0, 0] = torch.nan
        optimizer.step(loss=torch.tensor(2.0))
    assert optimizer.param_groups[0]["skipped"] == (steps > 5)
    return [p.detach() for p in params]


@BOTH
@pytest.mark.parametrize("options", [{"lr": 0.1}, {"lr": 0.1, "averaging": True}, {"lr": "auto"}], ids=str)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_run_is_that_of_the_plain_passes_and_repeats_bit_for_bit(cls, options, monkeypatch):
    everything = table.TABLE
    mine = [entry for entry in everything if issubclass(entry.kernels, MultiTensor)]
    monkeypatch.setattr(table, "TABLE", [*mine, table.Entry(Plain)])
    used, original = [], MultiTensor.run
    monkeypatch.setattr(MultiTensor, "run", lambda self, *a, **k: used.append(self) or original(self, *a, **k))
    ours = run(cls, weight_decay=0.1, **options)
    assert used
    torch.testing.assert_close(run(cls, weight_decay=0.1, **options), ours, rtol=0, atol=0)
    monkeypatch.setattr(table, "TABLE", [table.Entry(Plain)])
    torch.testing.assert_close(run(cls, weight_decay=0.1, **options), ours, rtol=1e-4, atol=1e-5)


@pytest.fixture
def moved(monkeypatch):
    """A function that says how many bytes of tensors were read and written since."""
    from triton.runtime.interpreter import InterpreterBuilder

    count = 0

    def counted(name, place_of_mask):
        original = getattr(InterpreterBuilder, name)

        def call(self, pointers, *rest):
            nonlocal count
            mask = rest[place_of_mask].data
            if mask.size > 1:  # else it is of the tables, or a number of the step
                count += int(np.count_nonzero(mask)) * pointers.get_element_ty().primitive_bitwidth // 8
            return original(self, pointers, *rest)

        monkeypatch.setattr(InterpreterBuilder, name, call)

    counted("create_masked_load", 0)
    counted("create_masked_store", 1)
    return lambda: count


@BOTH
@pytest.mark.parametrize(
    "kind, move, known, units",
    # In units of the parameters' size, without v and with it.
    [
        # Reads g, d, v, writes d, v; reads d, v, x, writes x. Not known: g, d, v; g, d, v, x and all but g.
        (Modelled, "step", True, (6, 9)),
        (Modelled, "step", False, (7, 10)),
        # Reads g, z - y, v, writes v; reads g, z - y, y, v, writes z - y, y. Not known: v is written later.
        (Averaged, "step", True, (7, 10)),
        (Averaged, "step", False, (7, 10)),
        # As the first; the origin is written at the first step, and read at the last one, where d and v are written again.
        (Ramp, "step", True, (6, 9)),
        (Ramp, "step", False, (7, 10)),
        (Ramp, "begin", True, (7, 10)),
        (Ramp, "back", True, (8, 12)),
    ],
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_what_is_read_and_written(cls, kind, move, known, units, weight_decay, moved):
    group = {"weight_decay": weight_decay, "divide": True, "bias_correction": True}
    made = bucket(kind, *cls.methods.values(), [(16, 40), (16, 7)], torch.float32, 0, **group)
    size = 4 * sum(t.numel() for t in made.roles["param"])
    beginning = Beginning(torch.tensor(3.0), torch.tensor(0.1), torch.tensor(True))
    passes(SETS[kind], kind, made, beginning, known, update_of(kind, True, move))
    # The first pass reads the parameters, or y, where they decay.
    assert moved() == size * (units[cls is MomoAdam] + (weight_decay > 0 and kind is not Ramp))
