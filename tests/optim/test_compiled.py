"""`compile=True`: the same steps as without, one compilation, and nothing lost where the set of gradients changes."""

import re

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

from momo_hf.optim import Momo, MomoAdam
from momo_hf.optim.kernels.compiled import LONG, ROW
from tests.optim.problem import compile_from


FSTAR = {"use_fstar": True, "weight_decay": 0.1}
PLAIN = {"weight_decay": 0.1, "divide": False, "betas": (0.0, 0.9)}
AVERAGED = {"averaging": True, "weight_decay": 0.1}
METHODS = [(Momo, {}), (MomoAdam, PLAIN), (MomoAdam, FSTAR)]
METHODS += [(Momo, {"averaging": True}), (MomoAdam, AVERAGED), (MomoAdam, {**AVERAGED, "divide": False})]


@pytest.fixture(autouse=True)
def small_tensors_are_compiled(monkeypatch):
    compile_from(monkeypatch, 64)


SHAPES = [(8, 5), (20, 10), (3,), (8, 16), *(9 * [(10, 20)])]  # two for a pack, one of a kind, a batch and two more


def parameters(dtype, shapes=SHAPES):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def run(cls, options, dtype, compile, missing=(), shapes=SHAPES):
    params = parameters(dtype, shapes)
    optimizer = cls(params, lr=1.0, compile=compile, **options)
    for step in range(6):
        for i, p in enumerate(params):
            p.grad = None if (step, i) in missing else torch.sin(p.detach() + step)
        if step == 3:
            optimizer.param_groups[0]["lr"] = 0.5
            optimizer.set_lb(-1.0)
        optimizer.step(loss=300.0 + step)  # large, so that parameters move by more than a bfloat16 rounds
    return params, optimizer


def assert_same(one, other, tolerance):
    for p, q in zip(one[0], other[0]):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
        for name, value in one[1].state[p].items():
            torch.testing.assert_close(value, other[1].state[q][name], rtol=tolerance, atol=tolerance)


# A bfloat16 has 8 bits, so that a last digit of the float32 arithmetic may turn into one of 0.4 %.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("cls, options", METHODS)
def test_compiled_steps_equal_eager_ones_compile_once_and_can_be_skipped(cls, options, dtype, tolerance):
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        compiled = run(cls, options, dtype, compile=True)
    assert_same(compiled, run(cls, options, dtype, compile=False), tolerance)
    params, optimizer = compiled
    everything = [*params, *(v for p in params for v in optimizer.state[p].values())]
    before = [tensor.detach().clone() for tensor in everything]
    params[1].grad[0, 0] = float("nan")
    optimizer.step(loss=1.0)
    assert optimizer.param_groups[0]["skipped"] == 1
    assert all(torch.equal(x, y) for x, y in zip(before, everything))


@pytest.mark.parametrize("bad", [None, float("nan")])
def test_long_rows_and_short_ones_of_one_number_keep_apart(bad):
    shapes = [*(4 * [(8, ROW)]), *(8 * [(64, LONG // 8)]), *(4 * [(8, ROW)])]  # 8 rows all, a full batch of them long
    ends = []
    for compile in (False, True):
        params = parameters(torch.float64, shapes)
        optimizer = MomoAdam(params, lr=1.0, compile=compile, averaging=True, weight_decay=0.1)
        for step in range(3):
            for p in params:
                p.grad = torch.sin(p.detach() + step)
            if step == 2 and bad is not None:
                params[5].grad[3, 3] = bad
            optimizer.step(loss=300.0 + step)
        assert optimizer.param_groups[0]["skipped"] == (bad is not None)
        ends.append((params, optimizer))
    assert_same(*ends, 1e-10)


@pytest.mark.parametrize("averaging", [False, True])
def test_a_compiled_search_finds_the_cap_of_an_eager_one(averaging):
    found = []
    for compile in (False, True):
        params = parameters(torch.float64)
        optimizer = MomoAdam(params, lr="auto", averaging=averaging, compile=compile)
        for step in range(64):
            for p in params:
                p.grad = p.detach() + 0.1 * torch.sin(100 * p.detach() + step)
            optimizer.step(loss=sum(float(p.detach().square().sum()) for p in params))
        found.append((optimizer.search, [p.detach() for p in params]))
    assert found[0][0].reason == found[1][0].reason and found[0][0].steps == found[1][0].steps
    assert found[0][0].cap == pytest.approx(found[1][0].cap, rel=1e-10)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-8, atol=1e-10)


def test_other_sets_of_gradients_and_other_models_do_not_compile_anew():
    missing = {(1, 1), (2, 3), (4, 1), (4, 3), (5, 0)}
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        compiled = run(MomoAdam, FSTAR, torch.float64, compile=True, missing=missing)
        run(MomoAdam, FSTAR, torch.float64, compile=True, shapes=[(8, 8), (70,), (9, 16), (30, 3)])
    assert_same(compiled, run(MomoAdam, FSTAR, torch.float64, compile=False, missing=missing), 1e-10)


def test_options_of_another_run_do_not_come_back_from_the_cache():
    for beta2 in (0.9, 0.99):
        torch.compiler.reset()  # forgets what is in memory; the graphs on disk stay
        options = {"betas": (0.5, beta2)}
        compiled = run(MomoAdam, options, torch.float64, compile=True)
        assert_same(compiled, run(MomoAdam, options, torch.float64, compile=False), 1e-10)


def test_options_that_change_on_the_way_count():
    ends = []
    for compile in (False, True):
        params = parameters(torch.float64)
        optimizer = MomoAdam(params, lr=1.0, compile=compile, averaging=0.7)
        for step, betas in enumerate([(0.9, 0.99), (0.9, 0.99), (0.9, 0.5), (0.9, 0.99)]):
            optimizer.param_groups[0]["betas"] = betas
            for p in params:
                p.grad = torch.sin(p.detach() + step)
            optimizer.step(loss=300.0 + step)
        ends.append(params)
    torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("odd", [0, 2])
def test_gradients_that_are_not_contiguous_count(odd):
    ends = []
    for compile in (False, True):
        params = parameters(torch.float64, [(16, 32), (512,)])
        optimizer = MomoAdam(params, lr=1.0, compile=compile)
        for step in range(4):
            for p in params:
                plain, expanded = torch.sin(p.detach() + step), torch.tensor(0.1, dtype=torch.float64).expand(p.shape)
                p.grad = expanded if step == odd else torch.stack([plain, plain], -1)[..., 0]
            optimizer.step(loss=300.0 + step)
        ends.append(params)
    torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="a gradient has the dtype of its parameter")
@pytest.mark.parametrize("averaging", [False, True])
def test_gradients_of_another_dtype_count(averaging):
    ends = []
    for compile in (True, False):
        params = parameters(torch.bfloat16)
        optimizer = MomoAdam(params, lr=0.1, compile=compile, averaging=averaging)
        for step in range(4):
            for p in params:
                p.grad, p.grad_dtype = None, torch.float32 if step % 2 else torch.bfloat16
                p.grad = torch.sin(p.detach() + step).to(p.grad_dtype)
            optimizer.step(loss=300.0)
        ends.append(params)
    for ours, expected in zip(*ends):
        torch.testing.assert_close(ours, expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("cls", [Momo, MomoAdam])
def test_autograd_sees_a_step(cls, compile):
    params = parameters(torch.float32)
    loss = (params[1] ** 2).sum()
    params[1].grad = torch.ones_like(params[1])
    cls(params, compile=compile).step(loss=1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "cls, known, options, first, second",
    # What each pass reads and writes: with g, d, v and x 9 in all, 10 where nobody knows whether g is finite.
    [
        (MomoAdam, True, {}, (3, 2), (3, 1)),
        (MomoAdam, True, {"weight_decay": 0.1}, (4, 2), (3, 1)),  # the decay asks for <d, x>
        (MomoAdam, False, {}, (3, 0), (4, 3)),
        (Momo, True, {}, (2, 1), (2, 1)),
        # With g, v, z - y and y 10, or 11.
        (MomoAdam, True, {"averaging": True}, (3, 1), (4, 2)),
        (MomoAdam, True, {"averaging": True, "weight_decay": 0.1}, (4, 1), (4, 2)),
        (MomoAdam, False, {"averaging": True}, (3, 0), (4, 3)),
        (Momo, True, {"averaging": True}, (2, 0), (3, 2)),
        # With the origin beside x; the slope along the last step needs the averages of before, and has a loop of its own.
        (MomoAdam, True, {"lr": "auto"}, (5, 4), (4, 4)),
    ],
)
def test_what_the_generated_code_reads_and_writes(cls, known, options, first, second, monkeypatch):
    params = parameters(torch.float32, [(4 * LONG,)])
    params[0].grad = torch.ones_like(params[0])
    optimizer = cls(params, compile=True, **options)
    if known:
        optimizer.loss_source = lambda *given: (torch.tensor(1.0), torch.tensor(0.5), True)
    else:
        monkeypatch.setattr("momo_hf.optim.steps.driver.is_known", lambda *args: False)
    step = optimizer.step if known else lambda: optimizer.step(loss=1.0)
    torch.compiler.reset()
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        _, codes = run_and_get_code(step)
    # Vectors of whole width, in the loops over a tensor; the rest of a tensor, and sums of rows, have lines of their own.
    in_rows, found = f"x1 + {LONG}L*x0", []
    assert (in_rows in codes[0]) == (known and "averaging" in options)
    for code in codes:
        place = re.escape(in_rows if in_rows in code else "x0")
        loads = re.findall(rf"loadu\(\w+ \+ static_cast<int64_t>\({place}\), static_cast<int64_t>\(\d+\)\)", code)
        stores = re.findall(rf"\.store\(\w+ \+ static_cast<int64_t>\({place}\)\)", code)
        found.append((len(loads), len(stores)))
    assert found == [first, second]
