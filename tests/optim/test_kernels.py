"""One table: every kind of step, method and kernel set against the plain one over random inputs, and who gets which."""

import ast
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import momo_hf.optim
from momo_hf.optim import Method, Momo, MomoAdam, MomoOptimizer
from momo_hf.optim.adam import Adam
from momo_hf.optim.kernels import table
from momo_hf.optim.kernels.compiled import ROW, Compiled, CompiledRest
from momo_hf.optim.kernels.fused import Fused
from momo_hf.optim.kernels.fused_steps import (
    FusedAdamAveraged,
    FusedAdamModelled,
    FusedAdamRamp,
    FusedMomentumModelled,
)
from momo_hf.optim.kernels.multi_tensor import MultiTensor
from momo_hf.optim.kernels.plain import Plain
from momo_hf.optim.steps.averaged import Averaged
from momo_hf.optim.steps.averaged_model import AveragedStep
from momo_hf.optim.steps.driver import now_of
from momo_hf.optim.steps.given import Beginning
from momo_hf.optim.steps.model import Step
from momo_hf.optim.steps.modelled import Modelled
from momo_hf.optim.steps.ramp import Ramp
from momo_hf.optim.steps.search import Move
from momo_hf.optim.tensors.buckets import Bucket
from tests.optim.methods import Rows, Sign


KINDS = (Modelled, Averaged, Ramp)
METHODS = (Method(), Adam(), Sign(), Rows())
# Every set with the kinds and methods that it serves, where it is known before the first pass that loss and gradients are
# finite, and where not. Those in Triton have a test of their own, because they run on no CPU.
CASES = [
    (kind, method, entry.kernels, known)
    for kind in KINDS
    for method in METHODS
    for entry in table.TABLE
    if entry.serves(kind, method) and not issubclass(entry.kernels, MultiTensor)
    for known in (True, False)
    if (known or not issubclass(entry.kernels, Fused)) and (entry.kernels, known) != (Plain, False)
]
# A compilation takes seconds, and every way to do a pass is one; `test_compiled` has the methods of the package.
COMPILED = [case for case in CASES if case[2] is Compiled and isinstance(case[1], (Sign, Rows)) and case[3]]
CASES = [case for case in CASES if not issubclass(case[2], Compiled)]


def random_bucket(kind, method, shapes, stored, seed, bad, tables=False, **group):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(stored, torch.float32)

    def random(shape, dtype):
        return torch.randn(shape, generator=generator).to(dtype)

    roles = {"param": [random(shape, stored) for shape in shapes], "grad": [random(shape, stored) for shape in shapes]}
    for param in roles["param"]:
        entry = {name: random(param.shape, wide) for name in ("exp_avg", "ahead", "origin")}
        entry |= {name: random(param.shape, wide).square() for name in method.buffers}
        entry |= {"y": param.to(wide)} if stored != wide else {}
        for role in kind.roles(method):
            roles.setdefault(role, []).append(entry.get(role, param))
    if bad is not None:
        roles["grad"][0].view(-1)[:1] = bad
    options = {"betas": (0.9, 0.99), "eps": 1e-8} if isinstance(method, Adam) else {}
    corrects = not isinstance(method, Adam) and seed % 2 == 0
    group = {"foreach": None, "compile": True, "bias_correction": not corrects, "averaging": 0.8, **group}
    return Bucket(0, {"beta": 0.9, **group}, method, options, None, tables, True, None, roles)


def update_of(kind, number, ok, seed):
    size = number(0.3 if ok else 0.0)
    if kind is Modelled:
        return Step(size.view(1), number(0.01 if ok else 0.0).view(1), torch.tensor(ok))
    if kind is Averaged:
        return AveragedStep(
            size.view(1), number(0.01 if ok else 0.0).view(1), number(0.2 if ok else 0.0), torch.tensor(ok)
        )
    back = ok and seed % 3 == 0
    return Move(number(0.3), torch.tensor(ok and not back), torch.tensor(back), torch.tensor(seed % 3 == 1))


def passes(kernel_set, kind, bucket, step, ok, known, seed):
    """The sums of both passes."""

    def number(value):
        return torch.tensor(value, dtype=bucket.dtype)

    weight = 0.1 if bucket.group["bias_correction"] or step > 1 else 1.0
    beginning = Beginning(number(step), number(weight), torch.tensor(ok))
    now = now_of(kind({}) if kind is Ramp else kind(), kernel_set, bucket, beginning, known)
    kernel = kernel_set(kind, bucket, now)
    sums = kernel.first()
    return sums, kernel.second(kernel.numbers(update_of(kind, number, ok, seed)))


@pytest.mark.parametrize("kind, method, kernel_set, known", CASES)
@settings(max_examples=8, deadline=None)
@given(
    shapes=st.lists(st.sampled_from([(3,), (5, 4), (20, 10), (10, 20), (64,), ()]), min_size=1, max_size=11),
    stored=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    step=st.integers(1, 300),
    seed=st.integers(0, 999),
    bad=st.sampled_from([None, float("nan"), float("inf")]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    divide=st.booleans(),
    tables=st.booleans(),
)
def test_every_set_does_what_the_plain_one_does(
    kind, method, kernel_set, known, shapes, stored, step, seed, bad, weight_decay, divide, tables
):
    compare(kind, method, kernel_set, known, shapes, stored, step, seed, bad, weight_decay, divide, tables)


@pytest.mark.slow
@pytest.mark.parametrize("kind, method, kernel_set, known", COMPILED)
def test_the_compiled_set_serves_any_kind_and_method(kind, method, kernel_set, known):
    shapes = [(2 * ROW,), (5, 4 * ROW), (10, 2 * ROW), (5, 4 * ROW)]
    for bad in (None, float("nan")):
        compare(kind, method, kernel_set, known, shapes, torch.bfloat16, 7, 3, bad, 0.1, True, False)


def compare(kind, method, kernel_set, known, shapes, stored, step, seed, bad, weight_decay, divide, tables):
    """Both passes of a set and of the plain one: their sums, what they write, and that nothing is written where it is bad."""
    group = {"weight_decay": weight_decay, "divide": divide, "tables": tables}
    ours, plain = (random_bucket(kind, method, shapes, stored, seed, bad, **group) for _ in range(2))
    if issubclass(kernel_set, Fused) and not kernel_set.take(ours, known)[0].roles["param"]:
        return
    before = {role: [t.clone() for t in tensors] for role, tensors in ours.roles.items()}
    # A bfloat16 may turn over in its last bit.
    close = {"rtol": 1e-9, "atol": 1e-9} if stored is torch.float64 else {"rtol": 2e-4, "atol": 2e-4}
    turned = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(stored, 0.0)
    found = passes(kernel_set, kind, ours, step, bad is None, known, seed)
    expected = passes(Plain, kind, plain, step, bad is None, False, seed)
    size = 1.0 + sum(t.numel() for t in ours.roles["param"])
    for x, y, names in zip(found, expected, (kind.SUMS, kind.LEFT), strict=True):
        # These are for who does not know whether everything is finite, and the first slope is that of no step.
        left_out = ("grad_norm_sq", "written", *(("slope",) if step == 1 else ()))
        counts = [name not in left_out for name in names]
        if bad is None or names is kind.LEFT:
            loose = {"rtol": close["rtol"], "atol": size * (close["atol"] / 10 + turned / 8)}
            chosen = torch.tensor(counts, dtype=torch.bool)
            torch.testing.assert_close(x[chosen], y[chosen], **loose)
    for role, tensors in ours.roles.items():
        loose = {"rtol": close["rtol"] + turned, "atol": close["atol"]} if role == "param" else close
        for x, y in zip(tensors, plain.roles[role]):
            torch.testing.assert_close(x, y, equal_nan=True, **loose)
        for x, y in zip(tensors, before[role]) if bad is not None and role != "origin" else ():
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def used(cls, numel=1 << 20, **options):
    """The sets that the parameters of an optimizer get."""
    large, small = nn.Parameter(torch.ones(numel)), nn.Parameter(torch.ones(3))
    optimizer, found = cls([large, small], **options), []
    large.grad, small.grad = torch.ones_like(large), torch.ones_like(small)
    original = table.assign
    with pytest.MonkeyPatch.context() as patch:
        # Nothing is done with them, so that nothing is compiled.
        patch.setattr("momo_hf.optim.steps.plan.assign", lambda *args: found.extend(original(*args)) or [])
        optimizer.step(loss=1.0)
    return [kernel_set for kernel_set, _ in found]


class SignOfAdam(Adam):
    def direction(self, vector, buffers, options):
        return vector.sign()


class FrozenSecondMoment(Adam):
    def update(self, grad, buffers, options):
        return {"exp_avg_sq": torch.ones_like(grad)}


class SignDescent(MomoAdam):
    methods = {"sign": SignOfAdam()}


class Frozen(MomoAdam):
    methods = {"frozen": FrozenSecondMoment()}


class AdamWithMomentum(Adam):
    keeps_momentum = True


class KeptMomentum(MomoAdam):
    methods = {"adam": AdamWithMomentum()}


def test_a_set_is_used_for_exactly_the_functions_it_was_written_for():
    assert used(MomoAdam) == [FusedAdamModelled]
    assert used(MomoAdam, averaging=True) == [FusedAdamAveraged]
    assert used(MomoAdam, lr="auto") == [FusedAdamRamp]
    assert used(MomoAdam, compile=True) == [Compiled, FusedAdamModelled]
    assert used(MomoAdam, numel=1 << 15, compile=True) == [FusedAdamModelled]
    assert used(SignDescent, numel=1 << 15, compile=True) == [CompiledRest, Plain]
    assert used(Momo) == [FusedMomentumModelled]
    assert used(SignDescent) == used(Frozen) == used(KeptMomentum) == used(KeptMomentum, averaging=True) == [Plain]


def test_of_tensors_of_middle_size_full_batches_alone_are_compiled(monkeypatch):
    """A call costs more than it saves where one such tensor is all that is in it."""
    monkeypatch.setattr("momo_hf.optim.kernels.compiled.WORTH", 128)
    monkeypatch.setattr("momo_hf.optim.tensors.chunks.PACKED", 32)
    alike = {16: 11, 32: 7, 128: 3, 20: 8, 200: 3}  # of which 20 and 200 are no whole rows
    shapes = [(size,) for size, count in alike.items() for _ in range(count)]
    bucket = random_bucket(Modelled, Adam(), shapes, torch.float32, 0, None)
    taken, left = Compiled.take(bucket, True)
    assert Counter(p.numel() for p in taken.roles["param"]) == {16: 8, 128: 3}
    taken, left = CompiledRest.take(left, True)  # where only the plain passes would take them
    assert Counter(p.numel() for p in taken.roles["param"]) == {32: 7}
    assert Counter(p.numel() for p in left.roles["param"]) == {16: 3, 20: 8, 200: 3}


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_method_with_its_own_functions_does_what_they_say(compile):
    grad = torch.tensor([3.0, -0.5]).repeat(1 << 14)
    for cls, expected in ((SignDescent, grad.sign()), (Frozen, grad * (1 - 0.999) ** 0.5)):
        p = nn.Parameter(torch.zeros_like(grad))
        p.grad = grad.clone()
        cls([p], lr=1e-2, lb=-1e9, compile=compile).step(loss=1.0)
        # At the cap the step is lr u. A v of 1 is corrected to 1 / (1 - 0.999).
        torch.testing.assert_close(p.detach(), -1e-2 * expected, rtol=1e-5, atol=1e-8)


def test_a_method_with_flags_of_its_own_does_what_they_say():
    p = nn.Parameter(torch.zeros(1 << 14))
    optimizer = KeptMomentum([p], lr=1e-2, lb=-1e9, averaging=0.5)
    z = x = exp_avg = exp_avg_sq = weights = 0.0
    for step, grad in enumerate((3.0, -1.0), 1):
        p.grad = torch.full_like(p, grad)
        optimizer.step(loss=1.0)
        exp_avg, exp_avg_sq = 0.9 * exp_avg + 0.1 * grad, 0.999 * exp_avg_sq + 0.001 * grad**2
        z -= 1e-2 * exp_avg / (1 - 0.9**step) / (exp_avg_sq / (1 - 0.999**step)) ** 0.5
        weights += step
        x += step / weights * (z - x)
    torch.testing.assert_close(p.detach(), torch.full_like(p, (z + x) / 2), rtol=1e-5, atol=1e-8)


class Twice(MomoOptimizer):
    """Two methods side by side."""

    methods = {"momentum": Method(), "sign": Sign()}

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1, "beta": 0.9, "weight_decay": 0.0, "lb": -1e9})


def test_a_group_says_which_method_its_parameters_have():
    one, other = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = Twice([{"params": [one]}, {"params": [other], "method": "sign"}])
    one.grad = other.grad = torch.tensor([3.0, -2.0, 0.5])
    optimizer.step(loss=1.0)
    torch.testing.assert_close(one.detach(), -0.1 * one.grad)
    torch.testing.assert_close(other.detach(), -0.1 * other.grad.sign())
    with pytest.raises(ValueError, match="`method` must be one of 'momentum', 'sign', got 'muon'"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "method": "muon"})


def test_no_file_imports_itself_in_a_circle():
    folder = Path(momo_hf.optim.__file__).parent
    imports = {}
    for file in folder.rglob("*.py"):
        parts = ("momo_hf", "optim", *file.relative_to(folder).with_suffix("").parts)
        name = ".".join(parts).removesuffix(".__init__")
        tree = ast.walk(ast.parse(file.read_text()))  # also what is imported for type hints alone
        nodes = [node for node in tree if isinstance(node, ast.ImportFrom) and node.module]
        imports[name] = {(node.module, f"{node.module}.{alias.name}") for node in nodes for alias in node.names}
    for name, pairs in imports.items():  # what is imported is a module or comes from one
        imports[name] = {inner if inner in imports else module for module, inner in pairs}
    open_names = {name: names & imports.keys() for name, names in imports.items()}
    while open_names:
        free = {name for name, names in open_names.items() if not names & open_names.keys()}
        assert free, f"a circle among {sorted(open_names)}"
        open_names = {name: names for name, names in open_names.items() if name not in free}
