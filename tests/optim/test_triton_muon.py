"""Muon's matrices by the kernels in Triton, run by Triton's interpreter, against the plain passes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from momo_hf.optim import MomoMuon, muon
from momo_hf.optim.kernels import multi_tensor_muon, table
from momo_hf.optim.kernels.multi_tensor import MultiTensor
from momo_hf.optim.kernels.multi_tensor_muon import MuonAveraged, MuonModelled, MuonRamp
from momo_hf.optim.kernels.plain import Plain
from momo_hf.optim.steps.averaged import Averaged
from momo_hf.optim.steps.modelled import Modelled
from momo_hf.optim.steps.ramp import Ramp
from tests.optim.test_triton import bucket, compare, interpreted


triton = pytest.importorskip("triton")
__all__ = ["interpreted"]  # a fixture
SETS = {Modelled: MuonModelled, Averaged: MuonAveraged, Ramp: MuonRamp}
METHOD = MomoMuon.methods["muon"]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy computes what a device leaves out


@pytest.fixture(autouse=True, scope="module")
def few_blocks_at_once():
    """A norm is added up in several rounds, as that of a large matrix is."""
    from momo_hf.optim.kernels import triton_muon

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_muon, "LANES", triton.language.constexpr(2))
        yield


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("known", [True, False])
@settings(max_examples=12, deadline=None)
@given(
    shapes=st.lists(
        st.sampled_from([(3, 5), (5, 4), (20, 10), (10, 20), (1, 9), (6, 2, 2, 2), (0, 4)]), min_size=1, max_size=6
    ),
    stored=st.sampled_from([torch.float32, torch.float16]),
    step=st.integers(1, 300),
    late=st.booleans(),
    seed=st.integers(0, 999),
    size=st.sampled_from([1.0, 1.0, 1e-30, 0.0]),
    bad=st.sampled_from([None, None, float("nan"), float("inf")]),
    move=st.sampled_from(["step", "begin", "back"]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    divide=st.booleans(),
    bias_correction=st.booleans(),
)
def test_they_do_what_the_plain_passes_do(kind, known, shapes, stored, step, late, seed, size, bad, move, **group):
    shapes = [(4, 4), *shapes]
    start = torch.tensor(3.0) if late else None
    ours, plain = (bucket(kind, METHOD, shapes, stored, seed, bad, start, **group) for _ in range(2))
    for made in (ours, plain):  # the last gradient and its average are perhaps tiny, or 0
        for role in {"grad", "exp_avg"}:
            made.roles[role][-1].mul_(size)
    assert SETS[kind].take(ours, known)[0].roles == ours.roles
    compare(SETS[kind], kind, known, ours, plain, step, late, bad is None, move, 1e-3)


@pytest.mark.parametrize("kind", SETS)
def test_convolutions_with_their_channels_last_are_left_to_the_plain_passes(kind):
    """A matrix is made of the elements in their own order."""
    made = bucket(kind, METHOD, [(6, 2, 2, 2)], torch.float32, 0)
    made.roles.update({role: [t.to(memory_format=torch.channels_last) for t in ts] for role, ts in made.roles.items()})
    assert SETS[kind].take(made, True)[0].roles["param"] == []


@pytest.mark.parametrize("kind", SETS)
def test_products_in_bfloat16(kind, monkeypatch):
    for module in (muon, multi_tensor_muon):
        monkeypatch.setattr(module, "product_dtype", lambda like: torch.bfloat16)
    shapes = [(20, 10), (4, 7), (10, 40), (4, 7)]
    group = {"weight_decay": 0.1, "divide": True, "bias_correction": True}
    ours, plain = (bucket(kind, METHOD, shapes, torch.float32, 0, **group) for _ in range(2))
    compare(SETS[kind], kind, True, ours, plain, 7, False, True, "step", 0.05)


def run(**options):
    """Some steps of matrices and others, with gradients that are missing, and matrices of some blocks and of none in a row."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(9, 16), (16, 9), (9, 16), (4, 3, 2, 2), (130,), (9,)]
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    params.append(nn.Parameter(torch.randn(6, 8, generator=generator).t()))
    matrices = [p for p in params if p.dim() > 1]
    groups = [{"params": matrices, "method": "muon"}, {"params": [p for p in params if p.dim() == 1]}]
    optimizer = MomoMuon(groups, weight_decay=0.1, **options)
    for step in range(8):
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=generator) if (i, step) != (1, 3) and step >= i else None
        if step == 5:
            params[0].grad[0, 0] = torch.nan
        optimizer.step(loss=torch.tensor(2.0))
    assert optimizer.param_groups[0]["skipped"] == 1
    return [p.detach() for p in params]


@pytest.mark.parametrize("options", [{"lr": 0.1}, {"lr": 0.1, "averaging": True}, {"lr": "auto"}], ids=str)
def test_a_run_is_that_of_the_plain_passes_and_repeats_bit_for_bit(options, monkeypatch):
    mine = [entry for entry in table.TABLE if issubclass(entry.kernels, MultiTensor)]
    monkeypatch.setattr(table, "TABLE", [*mine, table.Entry(Plain)])
    used, original = set(), MultiTensor.run
    monkeypatch.setattr(MultiTensor, "run", lambda self, *a, **k: used.add(type(self)) or original(self, *a, **k))
    ours = run(**options)
    assert used & set(SETS.values()) and used - set(SETS.values())
    torch.testing.assert_close(run(**options), ours, rtol=0, atol=0)
    monkeypatch.setattr(table, "TABLE", [table.Entry(Plain)])
    torch.testing.assert_close(run(**options), ours, rtol=1e-4, atol=1e-5)
