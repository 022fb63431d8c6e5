"""The formulas of the model in Triton, run by Triton's interpreter, against those on tensors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from momo_hf.optim import model, scalars
from momo_hf.optim.kernels import launch
from momo_hf.optim.model import ModelState


pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy computes what a device leaves out

LOSSES = st.floats(-3, 10, width=32)
SIZES = st.one_of(st.floats(0, 4, width=32), st.just(0.0))
FACTORS = st.one_of(st.none(), st.floats(0, 1, width=32), st.sampled_from([0.0, -0.5]))
RATES = st.one_of(st.floats(0, 2, width=32), st.just(0.0))
# At most one number is what must not pass.
BAD = st.one_of(st.none(), st.none(), st.sampled_from([math.nan, math.inf, -math.inf]))


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "runs_on", lambda device: True)
        yield


def numbers(data, values, count):
    return torch.tensor(data.draw(st.lists(values, min_size=count, max_size=count)))


def spoil(data, tensors):
    """Perhaps put something that is not finite into one of the tensors."""
    value, chosen = data.draw(BAD), data.draw(st.integers(0, len(tensors) - 1))
    if value is not None:
        tensors[chosen].fill_(value)


def assert_same(ours, expected, **close):
    for x, y in zip(ours, expected):
        torch.testing.assert_close(x, y, equal_nan=True, **close)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    groups=st.integers(1, 5),
    step=st.integers(0, 400),
    clip_factor=FACTORS,
    beta=st.sampled_from([0.0, 0.5, 0.9, 0.999]),
    bias_correction=st.booleans(),
    norm=st.one_of(st.none(), SIZES),
)
def test_the_beginning(data, groups, step, clip_factor, beta, bias_correction, norm):
    before = torch.tensor(float(step))
    given = [numbers(data, LOSSES, 1)[0]] + [numbers(data, RATES, groups) for _ in range(2)]
    given += [None if value is None else torch.tensor(value) for value in (clip_factor, norm)]
    spoil(data, [value for value in given if value is not None])
    step, weight, usable = scalars.begin(before, *given, beta=beta, bias_correction=bias_correction)
    assert step == before + 1 and usable.dtype == torch.bool
    torch.testing.assert_close(weight, model.average_weight(step, beta, bias_correction))
    assert usable == model.acceptable(*given)


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(),
    groups=st.integers(1, 5),
    step=st.integers(0, 400),
    clip_factor=FACTORS,
    usable=st.sampled_from([True, True, True, False]),
    lb=st.sampled_from([0.0, -1.5, 0.25]),
    beta=st.sampled_from([0.0, 0.5, 0.9, 0.999]),
    bias_correction=st.booleans(),
    use_fstar=st.booleans(),
    divide=st.booleans(),
    together=st.booleans(),
)
def test_the_step(data, groups, step, clip_factor, usable, together, **options):
    before = [float(step), *(data.draw(st.floats(-2, 5, width=32)) for _ in range(len(ModelState._fields) - 1))]
    state = ModelState(*map(torch.tensor, before))
    loss, strayed = numbers(data, LOSSES, 1)[0], numbers(data, LOSSES, 1)[0]
    products = torch.stack([numbers(data, SIZES, groups) for _ in range(3)], dim=1)
    if not together:  # in one matrix, as they come from the first pass, or each on its own
        products = products.t().contiguous().t()
    dual_norm_sq, overlap, grad_norm_sq = products.unbind(1)
    rates = [numbers(data, RATES, groups) for _ in range(2)]
    spoil(data, [loss, strayed, *products.unbind(1), *rates])
    given = (state, loss, dual_norm_sq, overlap, grad_norm_sq, strayed, *rates, torch.tensor(usable))
    options["clip_factor"] = None if clip_factor is None else torch.tensor(clip_factor)
    new, update = scalars.next_step(*given, **options)
    expected, expected_update = model.next_step(*given, **options)
    assert update.ok.dtype == torch.bool
    # Differences of large numbers keep no more digits than these have.
    size = max(1.0, *(float(x.abs().nan_to_num(0, 0, 0).max()) for x in (*state[1:], loss, strayed)))
    assert update.ok == expected_update.ok
    assert_same(new, expected, rtol=1e-4, atol=1e-4 * size)
    if update.ok:
        assert_same(update, expected_update, rtol=1e-4, atol=1e-5)
    else:
        assert not update.factor.any() and not update.decay.any()
        assert [name for name, x, y in zip(new._fields, new, state) if x != y] in (["skipped"], ["drift", "skipped"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("chosen", range(7))
def test_nothing_that_is_not_finite_passes(chosen, value):
    state = ModelState(*torch.arange(float(len(ModelState._fields))))
    # loss, n, s, |g|², lr, weight decay, clip factor
    given = [torch.tensor(2.0), *(torch.tensor([0.5, 0.25]) for _ in range(5)), torch.tensor(0.5)]
    given[chosen].fill_(value)
    loss, dual_norm_sq, overlap, grad_norm_sq, *rates, clip_factor = given
    usable = scalars.begin(state.step, loss, *rates, clip_factor, None, beta=0.9, bias_correction=True).usable
    products = (dual_norm_sq, overlap, grad_norm_sq, torch.tensor(0.1))
    options = {"lb": 0.0, "beta": 0.9, "bias_correction": True, "use_fstar": False, "divide": True}
    options["clip_factor"] = clip_factor
    _, update = scalars.next_step(state, loss, *products, *rates, usable, **options)
    assert not update.ok
    assert usable == (chosen in (1, 2, 3))
