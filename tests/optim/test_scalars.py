"""The formulas of the scalars in Python's numbers, and in Triton, run by its interpreter, against those on tensors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from momo_hf.optim.kernels import launch, scalars
from momo_hf.optim.steps import averaged_model, model
from momo_hf.optim.steps.arithmetic import Vector
from momo_hf.optim.steps.averaged_model import AveragedSums, AverageState
from momo_hf.optim.steps.given import Given, Settings
from momo_hf.optim.steps.model import ModelState, Sums


pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy computes what a device leaves out

LOSSES = st.floats(-3, 10, width=32)
# Squares and products of these are not 0 in float32.
SIZES = st.one_of(st.floats(2**-20, 4, width=32), st.just(0.0))
FACTORS = st.one_of(st.none(), st.floats(0, 1, width=32), st.sampled_from([0.0, -0.5]))
RATES = st.one_of(st.floats(2**-20, 2, width=32), st.just(0.0))
BETAS = st.sampled_from([0.0, 0.5, 0.9, 0.999])
# At most one number is what must not pass.
BAD = st.one_of(st.none(), st.none(), st.sampled_from([math.nan, math.inf, -math.inf]))


@pytest.fixture(autouse=True, scope="module", params=["host", "triton"])
def way(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "triton":
            pytest.importorskip("triton")
            patch.setattr(launch, "runs_on", lambda device: True)
        yield request.param


def tensors(record):
    """Numbers in tensors, whatever they were in."""
    made = [x if isinstance(x, torch.Tensor) else torch.tensor([*x] if isinstance(x, Vector) else x) for x in record]
    return type(record)(*made) if isinstance(record, tuple) else made


def spoil(draw, tensors):
    """Perhaps put something that is not finite into one of the tensors."""
    value, chosen = draw(BAD), draw(st.integers(0, len(tensors) - 1))
    if value is not None:
        tensors[chosen].fill_(value)


def assert_same(ours, expected, **close):
    for x, y in zip(ours, expected):
        torch.testing.assert_close(x, y, equal_nan=True, **close)


@st.composite
def givens(draw, groups, clip_factor):
    """What a step is given; perhaps with a number that is not finite."""

    def numbers(values, count):
        return torch.tensor(draw(st.lists(values, min_size=count, max_size=count)))

    loss, rates = numbers(LOSSES, 1)[0], [numbers(RATES, groups) for _ in range(2)]
    kappa = None if clip_factor is None else torch.tensor(clip_factor)
    spoil(draw, [loss, *rates, *([] if kappa is None else [kappa])])
    return Given(loss, kappa, False, *rates)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    groups=st.integers(1, 5),
    step=st.integers(0, 400),
    clip_factor=FACTORS,
    beta=BETAS,
    bias_correction=st.booleans(),
    norm=st.one_of(st.none(), SIZES, BAD),
)
def test_the_beginning(data, groups, step, clip_factor, beta, bias_correction, norm):
    before = torch.tensor(float(step))
    made = data.draw(givens(groups, clip_factor))
    norm = None if norm is None else torch.tensor(norm)
    options = Settings(0.0, beta, bias_correction, False, True)
    step, weight, inputs_valid = tensors(scalars.begin(before, made, norm, options))
    assert step == before + 1 and inputs_valid.dtype == torch.bool
    torch.testing.assert_close(weight, model.average_weight(step, beta, bias_correction))
    assert inputs_valid == model.acceptable(made, norm)


@st.composite
def sums_of(draw, groups, width):
    """Sums over the parameters, in one matrix, as they come from the first pass, or each on its own."""
    rows = st.lists(SIZES, min_size=groups, max_size=groups)
    sums = torch.tensor(draw(st.lists(rows, min_size=width, max_size=width))).reshape(width, groups)
    sums = sums if draw(st.booleans()) else sums.T.contiguous().T
    spoil(draw, list(sums.unbind()))
    return sums.unbind()


def assert_step(ours, expected, step, expected_step, before, size):
    """The same states, apart from the rounding of numbers of some size, and the same step, or none."""
    assert step.accepted.dtype == torch.bool and step.accepted == expected_step.accepted
    assert_same(ours, expected, rtol=1e-4, atol=1e-4 * size)
    assert_same(step, expected_step, rtol=1e-4, atol=1e-5)
    if not step.accepted:
        assert not any(value.any() for value in step)
        changed = [name for name, x, y in zip(ModelState._fields, ours, before) if x != y]
        assert changed in (["skipped"], ["drift", "skipped"])
        assert_same(ours[len(ModelState._fields) :], before[len(ModelState._fields) :], rtol=0, atol=0)


def size_of(numbers):
    """Differences of large numbers keep no more digits than these have."""
    return max(1.0, *(float(x.abs().nan_to_num(0, 0, 0).max()) for x in numbers))


STEPS = {
    "data": st.data(),
    "groups": st.integers(1, 5),
    "step": st.integers(0, 400),
    "clip_factor": FACTORS,
    "inputs_valid": st.sampled_from([True, True, True, False]),
    "lb": st.sampled_from([0.0, -1.5, 0.25]),
    "beta": BETAS,
    "bias_correction": st.booleans(),
    "divide": st.booleans(),
}


@settings(max_examples=100, deadline=None)
@given(use_fstar=st.booleans(), **STEPS)
def test_the_step(data, groups, step, clip_factor, inputs_valid, **options):
    before = [float(step), *(data.draw(st.floats(-2, 5, width=32)) for _ in range(len(ModelState._fields) - 1))]
    state = ModelState(*map(torch.tensor, before))
    made, sums = data.draw(givens(groups, clip_factor)), Sums(*data.draw(sums_of(groups, 3)))
    strayed = torch.tensor(data.draw(st.one_of(LOSSES, LOSSES, st.just(math.nan))))
    given = (state, made, sums, strayed, torch.tensor(inputs_valid), Settings(**options))
    ours, update = map(tensors, scalars.next_step(*given))
    expected, expected_update = model.next_step(*given)
    assert_step(ours, expected, update, expected_update, state, size_of([*state[1:], made.loss, strayed]))


@settings(max_examples=100, deadline=None)
@given(power=st.sampled_from([1, 3]), polyak=st.sampled_from([1.0, 2.0]), **STEPS)
def test_the_averaged_step(data, groups, step, clip_factor, inputs_valid, power, polyak, **options):
    before = [float(step), *(data.draw(st.floats(-2, 5, width=32)) for _ in range(len(ModelState._fields) - 1))]
    states = ModelState(*map(torch.tensor, before)), AverageState(*(torch.tensor(data.draw(SIZES)) for _ in range(4)))
    made, sums = data.draw(givens(groups, clip_factor)), AveragedSums(*data.draw(sums_of(groups, 4)))
    given = (*states, made, sums, torch.tensor(inputs_valid), Settings(use_fstar=False, **options))
    *ours, update = map(tensors, scalars.next_averaged_step(*given, power=power, polyak=polyak))
    *expected, expected_update = averaged_model.next_averaged_step(*given, power=power, polyak=polyak)
    ours, expected, before = ([*model, *averages] for model, averages in (ours, expected, states))
    assert_step(ours, expected, update, expected_update, before, size_of([*before[1:], made.loss]))


def test_without_momentum_an_average_is_its_last_sample():
    state, averages = ModelState(*torch.zeros(9)), AverageState(*torch.tensor([1e3, 1e3, 0.0, 0.0]))
    made = Given(torch.tensor(1.0), None, True, torch.tensor([1.0]), torch.zeros(1))
    sums = AveragedSums(torch.tensor([1e-6]), *torch.zeros(3, 1))
    options = Settings(0.0, 0.0, True, False, True)
    found = scalars.next_averaged_step(state, averages, made, sums, torch.tensor(True), options, power=3, polyak=1.0)
    torch.testing.assert_close(tensors([*found[1][:2]]), [torch.tensor(1.0), torch.tensor(1e-6)])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("chosen", range(8))
@pytest.mark.parametrize("averages", [False, True])
def test_nothing_that_is_not_finite_passes(chosen, value, averages):
    state = ModelState(*torch.arange(float(len(ModelState._fields))))
    # loss, lr, weight decay, clip factor, and the sums
    numbers = [torch.tensor(2.0), *(torch.tensor([0.5, 0.25]) for _ in range(2)), torch.tensor(0.5)]
    numbers += [torch.tensor([0.5, 0.25]) for _ in range(4)]
    numbers[chosen].fill_(value)
    loss, *rates, kappa = numbers[:4]
    made, options = Given(loss, kappa, True, *rates), Settings(0.0, 0.9, True, False, True)
    inputs_valid = scalars.begin(state.step, made, None, options).inputs_valid
    assert inputs_valid == (chosen > 3)
    if averages:
        given = (state, AverageState(*state[:4]), made, AveragedSums(*numbers[4:]), inputs_valid, options)
        assert not scalars.next_averaged_step(*given, power=3, polyak=2.0)[2].accepted
    elif chosen < 7:
        given = (state, made, Sums(*numbers[4:7]), torch.tensor(0.1), inputs_valid, options)
        assert not scalars.next_step(*given)[1].accepted
