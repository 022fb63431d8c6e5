"""The step that averages its iterates, against its formulas in NumPy and against schedule-free AdamW."""

import numpy as np
import pytest
import schedulefree
import torch
from torch import nn

from momo_hf.optim import Method, Momo, MomoAdam, MomoOptimizer
from tests.averaging_reference import (
    GROUPS,
    AveragingReference,
    close,
    give,
    in_groups,
    problem,
    values,
    z_of,
)
from tests.optim.problem import least_squares


# ---- The formulas ----


@pytest.mark.parametrize("cls, lrs", [(Momo, [40.0, 16.0]), (MomoAdam, [0.5, 0.2])])
@pytest.mark.parametrize("decays", [[0.0, 0.0], [0.01, 0.1]])
@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("foreach", [None, False])
def test_every_step_is_that_of_the_formulas(cls, lrs, decays, divide, foreach):
    """Two groups, a warmup from 0, clipping, capped and Polyak steps, a lower bound, decay at z and at y."""
    start, params, at = problem()
    options = {"averaging": 0.85, "lb": 0.02, "foreach": foreach}
    if cls is MomoAdam:
        optimizer = cls(in_groups(params, lrs, decays), divide=divide, **options)
    else:
        optimizer = cls(in_groups(params, lrs, decays), **options)
        for group in optimizer.param_groups:
            group["divide"] = divide
    beta2 = 0.999 if cls is MomoAdam else None
    reference = AveragingReference(
        start, GROUPS, list(lrs), decays, interpolation=0.85, beta2=beta2, lb=0.02, divide=divide
    )
    kinds = []
    for step in range(60):
        scale = min(step / 5, 1.0)
        reference.lrs = [scale * lr for lr in lrs]
        for group, lr in zip(optimizer.param_groups, reference.lrs):
            group["lr"] = lr
        loss, grads = at(reference.y, step)
        kappa = 0.5 if step % 7 == 3 else 1.0
        give(params, [kappa * g for g in grads])
        if kappa < 1:
            optimizer.set_clip_factor(kappa)
        optimizer.step(loss=torch.tensor(loss, dtype=torch.float64))
        reference.step(loss, [kappa * g for g in grads], kappa)
        tau = float(optimizer.param_groups[0]["effective_lr"])
        assert tau == pytest.approx(reference.taus[-1], rel=1e-10)
        kinds.append(tau < reference.lrs[0])
        assert close(values(params), reference.y)
        assert close([z_of(optimizer, p) for p in params], reference.z)
        assert float(optimizer.param_groups[1]["effective_lr"]) == pytest.approx(tau * lrs[1] / lrs[0])
    assert any(kinds[5:]) and not all(kinds[5:])
    assert float(optimizer.param_groups[0]["capped"]) == kinds.count(False)
    optimizer.eval()
    assert close(values(params), reference.x)
    assert float(optimizer.param_groups[0]["weight_sum"]) == pytest.approx(sum(reference.weights))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_at_the_cap_it_is_schedule_free_adamw(dtype, tolerance, weight_decay):
    _, ours, at = problem(dtype=dtype)
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    momo = MomoAdam(ours, lr=1e-2, weight_decay=weight_decay, divide=False, averaging=0.9, lb=-1e6)
    free = schedulefree.AdamWScheduleFree(theirs, lr=1e-2, weight_decay=weight_decay, r=3.0, weight_lr_power=2.0)
    free.train()
    for step in range(50):
        _, grads = at(values(theirs), step)
        give(ours, grads)
        give(theirs, grads)
        momo.step(loss=1.0)
        free.step()
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert momo.param_groups[0]["capped"] == 50
    momo.eval()
    free.eval()
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("cls", [Momo, MomoAdam])
def test_a_state_from_before_goes_on_with_the_weights_that_it_had(cls):
    """They were k times the squared largest step; what says so was not in the state."""
    start, params, at = problem()
    reference = AveragingReference(start, GROUPS, [0.2], [0.0], beta2=0.999 if cls is MomoAdam else None, power=1)
    reference.groups = [0] * len(start)

    def steps(optimizer, numbers):
        for step in numbers:
            loss, grads = at(reference.y, step)
            give(params, grads)
            optimizer.step(loss=loss)
            reference.step(loss, grads)
            assert close(values(params), reference.y)

    older = cls(params, lr=0.2, averaging=True)
    steps(older, range(1))  # whose weight is 1 either way
    older.param_groups[0]["averaging_power"] = 1
    steps(older, range(1, 20))
    state = older.state_dict()
    assert state["param_groups"][0].pop("averaging_power") == 1
    del state["param_groups"][0]["polyak_factor"]
    newer = cls(params, lr=0.2, averaging=True)
    newer.load_state_dict(state)
    steps(newer, range(20, 60))
    assert newer.param_groups[0]["polyak_factor"] == 1
    newer.eval()
    assert close(values(params), reference.x)
    newer.train()
    newer.state.clear()
    newer.step(loss=1.0)  # as a new one
    assert (newer.param_groups[0]["averaging_power"], newer.param_groups[0]["polyak_factor"]) == (3, 2)


def test_a_method_of_ones_own_averages_too():
    """With D = 2 and the cap twice as large it takes the steps of Momo."""

    class Halves(Method):
        buffers = ("count",)

        def update(self, grad, buffers, options):
            return {"count": buffers["count"] + options["by"]}

        def direction(self, vector, buffers, options):
            return vector / options["two"]

        def corrections(self, step, options):
            return {"two": 2 + 0 * step}

    class Halved(MomoOptimizer):
        methods = {"halves": Halves()}

    start, params, at = problem()
    own = Halved(params, {"lr": 100.0, "weight_decay": 0.0, "beta": 0.9, "lb": 0.0, "by": 1.0, "averaging": True})
    reference = AveragingReference(start, [0] * 4, [50.0], [0.0], beta2=None)
    for step in range(30):
        loss, grads = at(reference.y, step)
        give(params, grads)
        own.step(loss=torch.tensor(loss, dtype=torch.float64))
        reference.step(loss, grads)
        assert close(values(params), reference.y)
    own.eval()
    assert close(values(params), reference.x)
    assert all((own.state[p]["count"] == 30).all() for p in params)


def test_a_parameter_that_joins_averages_its_own_steps_and_one_without_a_gradient_stays():
    start, params, at = problem()
    optimizer = MomoAdam(params, lr=0.03, averaging=True)
    reference = AveragingReference(start, [0] * 4, [0.03], [0.0])
    for step in range(40):
        loss, grads = at(reference.y, step)
        if step < 20:
            grads[1] = None
        if step % 3 == 1:
            grads[3] = None
        give(params, grads)
        optimizer.step(loss=torch.tensor(loss, dtype=torch.float64))
        reference.step(loss, grads)
        assert close(values(params), reference.y)
    optimizer.eval()
    assert close(values(params), reference.x)
    assert set(optimizer.state[params[1]]) == {"ahead", "exp_avg_sq", "start"}


def test_in_noise_the_average_is_better_than_the_point_of_gradients():
    """What it is for, at a constant step size. The loss without noise is 0.05 at its least."""
    _, params, at = problem()
    optimizer = MomoAdam(params, lr=0.3, averaging=True, lb=-1e6)
    for step in range(300):
        loss, grads = at(values(params), step)
        give(params, grads)
        optimizer.step(loss=loss)

    def excess():
        return np.mean([at(values(params), 5000 + step)[0] for step in range(200)])

    in_training = excess()
    z = np.mean([at([z_of(optimizer, p) for p in params], 5000 + step)[0] for step in range(200)])
    optimizer.eval()
    assert excess() < in_training < z


def test_a_step_of_0_above_the_lower_bound_is_no_stall():
    """z lies downhill of y, so far that the model at z is below the bound; the loss is not."""
    p = nn.Parameter(torch.zeros(3))
    optimizer = MomoAdam([p], lr=1.0, averaging=True)
    p.grad = torch.ones(3)
    optimizer.step(loss=100.0)
    optimizer.state[p]["ahead"].fill_(-1.0)
    for loss, stalled in ((0.01, 0), (0.0, 1), (-1.0, 2)):
        optimizer.step(loss=loss)
        assert optimizer.param_groups[0]["stalled"] == stalled


# ---- Low precision ----


def test_in_bfloat16_nothing_is_lost_over_300_steps():
    """Steps of a fiftieth of the last digit of the largest weights: the average has to follow that of a float32 run."""
    _, low, at = problem(dtype=torch.bfloat16)
    high = [nn.Parameter(p.detach().float()) for p in low]
    start = [p.detach().float().clone() for p in low]
    optimizers = [MomoAdam(p, lr=1e-4, averaging=True, lb=-1e6) for p in (low, high)]
    for step in range(300):
        _, grads = at(values(high), step)  # the same gradients for both
        for params, optimizer in zip((low, high), optimizers):
            give(params, [torch.tensor(g).bfloat16().double().numpy() for g in grads])
            optimizer.step(loss=1.0)
    for optimizer in optimizers:
        optimizer.eval()
    for p, q, s in zip(low, high, start):
        assert torch.equal(p, q.bfloat16())
        assert (q - s).abs().max() > 1e-3


# ---- What it refuses ----


@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_fstar": True}, "`use_fstar` must be False"),
        ({"averaging": 1}, r"`averaging` must be True, False or a number in \(0, 1\).*got 1\."),
        ({"averaging": 1.5}, "`averaging` must be.*got 1.5"),
        ({"averaging": "yes"}, "`averaging` must be.*got 'yes'"),
    ],
)
def test_options_that_do_not_go_with_it(options, message):
    params, _ = least_squares()
    with pytest.raises(ValueError, match=message):
        MomoAdam(params, **{"averaging": True, **options})


def test_numbers_of_numpy_are_numbers():
    params, _ = least_squares()
    share = MomoAdam(params, averaging=np.float64(0.5)).param_groups[0]["averaging"]
    assert type(share) is float and share == 0.5


def test_groups_cannot_differ_in_it():
    params, _ = least_squares()
    with pytest.raises(ValueError, match="`averaging` must be the same"):
        MomoAdam([{"params": params[:1]}, {"params": params[1:], "averaging": True}])
