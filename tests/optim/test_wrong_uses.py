"""Wrong arguments, losses, gradients and checkpoints, each with the words for it; stalls and clipping."""

import copy

import pytest
import torch
from torch import nn

from momo_hf.optim import Momo, MomoAdam
from tests.optim.problem import both, least_squares, train


def parameter():
    return [nn.Parameter(torch.ones(3))]


WRONG_ARGUMENTS = [
    (Momo, {"lr": -1.0}, "`lr`.*-1.0"),
    (Momo, {"lr": torch.ones(2)}, "`lr`.*one number"),
    (Momo, {"weight_decay": -0.1}, "`weight_decay`.*-0.1"),
    (Momo, {"beta": 1.0}, "`beta`.*1.0"),
    (Momo, {"lb": float("nan")}, "`lb`.*nan"),
    (MomoAdam, {"lb": float("-inf")}, "`lb`.*inf"),
    (MomoAdam, {"betas": (1.5, 0.9)}, r"`betas\[0\]`.*1.5"),
    (MomoAdam, {"betas": (0.9, 1.0)}, r"`betas\[1\]`.*1.0"),
    (MomoAdam, {"eps": -1e-8}, "`eps`.*-1e-08"),
    (MomoAdam, {"use_fstar": "share"}, "`use_fstar` must be one of False, True, got 'share'"),
    (MomoAdam, {"use_fstar": 1}, "`use_fstar` must be one of .* got 1"),
]


@pytest.mark.parametrize("cls, options, message", WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(parameter(), **options)


def test_groups_share_one_model():
    with pytest.raises(ValueError, match="`lb` must be the same"):
        Momo([{"params": parameter()}, {"params": parameter(), "lb": 1.0}])


@both
def test_wrong_losses_are_named(cls):
    params, backward = least_squares()
    optimizer = cls(params, lr=0.1)
    loss = backward()
    with pytest.raises(RuntimeError, match=r"step\(loss=loss\).*set_loss"):
        optimizer.step()
    optimizer.step(loss=loss)
    with pytest.raises(RuntimeError, match="needs the loss"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"one element, got shape \(2,\)"):
        optimizer.step(loss=torch.ones(2))
    with pytest.raises(ValueError, match="on meta, but the parameters are on cpu"):
        optimizer.step(loss=torch.ones((), device="meta"))
    with pytest.raises(ValueError, match="`closure` or `loss`, got both"):
        optimizer.step(lambda: loss, loss=loss)


@pytest.mark.parametrize("loss", [torch.tensor(1.0), 1.0])
def test_a_loss_by_position_is_told_its_name(loss):
    with pytest.raises(TypeError, match=rf"got {type(loss).__name__}.*step\(loss=loss\)"):
        Momo(parameter()).step(loss)


@both
@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_sparse_and_complex_gradients_are_refused(cls, kind):
    dtype = torch.complex64 if kind == "complex" else torch.float32
    p = nn.Parameter(torch.ones(4, dtype=dtype))
    p.grad = torch.ones(4).to_sparse() if kind == "sparse" else torch.ones(4, dtype=dtype)
    with pytest.raises(RuntimeError, match=f"is {kind}"):
        cls([p]).step(loss=1.0)


@both
def test_checkpoints_of_other_methods_are_refused(cls):
    params, backward = least_squares()
    optimizer = cls(params)
    train(optimizer, backward, 1)
    adamw = torch.optim.AdamW(params)
    adamw.step()
    other = {Momo: MomoAdam, MomoAdam: Momo}[cls](params)
    train(other, backward, 1)
    for foreign in (adamw, other):
        with pytest.raises(ValueError, match=f"not saved by {cls.__name__}"):
            optimizer.load_state_dict(foreign.state_dict())


@both
def test_a_checkpoint_without_options_added_since_loads_with_their_defaults(cls):
    params, backward = least_squares()
    optimizer = cls(params, lr=0.05, weight_decay=0.01)
    train(optimizer, backward, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        for name in ("compile", "stalled", "use_fstar"):
            del group[name]
    for entry in saved["state"].values():
        del entry["start"]
    resumed = cls(params, lr=0.05)
    resumed.load_state_dict(saved)
    before, after = optimizer.param_groups[0], resumed.param_groups[0]
    assert after["weight_decay"] == 0.01 and after["use_fstar"] is False and after["stalled"] == 0
    assert after["drift"] == before["drift"] and after["step"] == 5
    train(resumed, backward, 1)


@pytest.mark.slow
@both
def test_a_step_inside_a_compiled_function_is_taken_outside_of_its_graph(cls):
    params, backward = least_squares()
    optimizer = cls(params, lr=0.05)
    backward()
    torch.compile(lambda loss: optimizer.step(loss=loss))(torch.tensor(1.0))
    assert optimizer.param_groups[0]["step"] == 1
    with pytest.raises(RuntimeError, match="compile the model, not the step"):
        torch.compile(lambda loss: optimizer.step(loss=loss), fullgraph=True)(torch.tensor(1.0))


@both
def test_stalled_steps_are_counted(cls):
    params, backward = least_squares()
    optimizer = cls(params, lr=0.1, lb=1e6)
    train(optimizer, backward, 50)
    assert optimizer.param_groups[0]["stalled"] == 50 and optimizer.param_groups[0]["effective_lr"] == 0


@pytest.mark.slow
@both
def test_scaling_the_gap_keeps_a_clipped_run_on_its_way(cls):
    """Consistent least squares, a large lr and gradients clipped far below their norm."""

    def run(tell):
        params, backward = least_squares(torch.float64)
        with torch.no_grad():
            params[0].mul_(100)
        optimizer = cls(params, lr=100.0)
        losses = []
        for _ in range(2000):
            loss = backward()
            norm = torch.nn.utils.clip_grad_norm_(params, 0.1)
            if tell:
                optimizer.set_clip_factor(0.1 / (norm + 1e-6))
            losses.append(float(optimizer.step(loss=loss.detach())))
        return losses[0], losses[-1]

    first, last = run(tell=True)
    assert last < 1e-6 * first
    first, last = run(tell=False)
    assert not last < 1e-6 * first
