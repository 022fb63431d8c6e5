"""Every kernel set against the plain one over random inputs, and who gets which."""

import ast
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import momo_hf.optim
from momo_hf.optim import Momo, MomoAdam, kernels
from momo_hf.optim.buckets import Bucket
from momo_hf.optim.kernels.compiled import ROW, Compiled
from momo_hf.optim.kernels.fused import Fused, FusedAdam, FusedMomentum
from momo_hf.optim.kernels.multi_tensor import MultiTensor
from momo_hf.optim.kernels.plain import Plain


# Every set with its methods, where it is known before the first pass that loss and gradients are finite, and where not.
# Those in Triton have a test of their own, because they run on no CPU.
TABLE = [entry for entry in kernels.TABLE if not issubclass(entry.kernels, MultiTensor)]
PAIRS = dict.fromkeys((entry.kernels, entry.method or cls) for entry in TABLE for cls in (MomoAdam, Momo))
SETS = [(*pair, known) for pair in PAIRS for known in (True, False) if (pair[0], known) != (Plain, False)]
SETS = [
    (kernel_set, method, known) for kernel_set, method, known in SETS if known or not issubclass(kernel_set, Fused)
]
SETS = [pytest.param(*case, marks=pytest.mark.slow if case[0] is Compiled else ()) for case in SETS]


def bucket(method, shapes, stored, seed, bad, **group):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(stored, torch.float32)
    roles = {role: [] for role in ("param", "grad", "exp_avg", *method.buffers)}
    for shape in shapes:
        for role in roles:
            tensor = torch.randn(shape, generator=generator).to(stored if role in ("param", "grad") else wide)
            roles[role].append(tensor.square_() if role == "exp_avg_sq" else tensor)
    if bad is not None:
        roles["grad"][0].view(-1)[:1] = bad
    options = {"betas": (0.9, 0.99), "eps": 1e-8} if method is MomoAdam else {}
    group = {"foreach": None, "compile": True, "bias_correction": method is MomoAdam, **group}
    return Bucket(0, group, options, None, True, None, roles)


def passes(kernel_set, method, made, step, ok, known):
    def scalar(value):
        return torch.tensor(value, dtype=made.dtype)

    weight = 1.0 if method is Momo and step == 1 else 0.1
    kernel = kernel_set(method, made, scalar(weight), scalar(float(step)), torch.tensor(ok) if known else None)
    factor, decay = (scalar(0.3), scalar(0.01)) if ok else (scalar(0.0), scalar(0.0))
    before = kernel.overlap()
    return kernel.products()[:2], before, kernel.write(factor, decay, torch.tensor(ok))


@pytest.mark.parametrize("kernel_set, method, known", SETS)
@settings(max_examples=8, deadline=None)
@given(
    shapes=st.lists(st.sampled_from([(3,), (5, 4), (20, 10), (10, 20), (64,), ()]), min_size=1, max_size=11),
    stored=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    step=st.integers(1, 300),
    seed=st.integers(0, 999),
    bad=st.sampled_from([None, float("nan"), float("inf")]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    divide=st.booleans(),
)
def test_every_set_does_what_the_plain_one_does(
    kernel_set, method, known, shapes, stored, step, seed, bad, weight_decay, divide
):
    if kernel_set is Compiled:  # it takes whole rows, and many
        shapes = [(*shape, 2 * ROW) for shape in shapes]
    group = {"weight_decay": weight_decay, "divide": divide}
    ours, plain = (bucket(method, shapes, stored, seed, bad, **group) for _ in range(2))
    if issubclass(kernel_set, Fused) and not kernel_set.take(ours, known)[0].roles["param"]:
        return
    before = [t.clone() for tensors in ours.roles.values() for t in tensors]
    # A bfloat16 may turn over in its last bit.
    close = {"rtol": 1e-9, "atol": 1e-9} if stored is torch.float64 else {"rtol": 2e-4, "atol": 2e-4}
    turned = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(stored, 0.0)
    found = passes(kernel_set, method, ours, step, bad is None, known)
    expected = passes(Plain, method, plain, step, bad is None, False)
    sums = slice(None) if bad is None else slice(1, None)
    for x, y in zip(found[sums], expected[sums]):
        size = 1.0 + sum(t.numel() for t in ours.roles["param"])
        torch.testing.assert_close(x, y, rtol=close["rtol"], atol=size * (close["atol"] / 10 + turned / 8))
    for role, tensors in ours.roles.items():
        loose = {"rtol": close["rtol"] + turned, "atol": close["atol"]} if role == "param" else close
        for x, y in zip(tensors, plain.roles[role]):
            torch.testing.assert_close(x, y, equal_nan=True, **loose)
    if bad is not None:
        for x, y in zip([t for tensors in ours.roles.values() for t in tensors], before):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def used(cls, **options):
    """The sets that the parameters of an optimizer get."""
    large, small = nn.Parameter(torch.ones(1 << 15)), nn.Parameter(torch.ones(3))
    optimizer, found = cls([large, small], **options), []
    large.grad, small.grad = torch.ones_like(large), torch.ones_like(small)
    original = momo_hf.optim.passes.assign
    try:
        momo_hf.optim.passes.assign = lambda *args: found.extend(original(*args)) or found
        optimizer.step(loss=1.0)
    finally:
        momo_hf.optim.passes.assign = original
    return [kernel_set for kernel_set, _ in found]


class SignDescent(MomoAdam):
    @staticmethod
    def precondition(vector, buffers, options):
        return vector / vector.abs().clamp(min=1e-12)


class FrozenSecondMoment(MomoAdam):
    @staticmethod
    def update_buffers(grad, buffers, options):
        return {"exp_avg_sq": torch.ones_like(grad)}


def test_a_set_is_used_for_exactly_the_functions_it_was_written_for():
    assert used(MomoAdam) == [FusedAdam]
    assert used(MomoAdam, compile=True) == [Compiled, FusedAdam]
    assert used(Momo) == [FusedMomentum]
    assert used(SignDescent) == used(FrozenSecondMoment) == [Plain]


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_subclass_with_its_own_functions_does_what_they_say(compile):
    grad = torch.tensor([3.0, -0.5]).repeat(1 << 14)
    for cls, expected in ((SignDescent, grad.sign()), (FrozenSecondMoment, grad * (1 - 0.999) ** 0.5)):
        p = nn.Parameter(torch.zeros_like(grad))
        p.grad = grad.clone()
        cls([p], lr=1e-2, lb=-1e9, compile=compile).step(loss=1.0)
        # At the cap the step is lr d / (ρ D), with d = ρ g; a v of 1 is corrected to 1 / (1 - 0.999).
        if cls is SignDescent:
            expected = expected / (1 - 0.9)
        torch.testing.assert_close(p.detach(), -1e-2 * expected, rtol=1e-5, atol=1e-8)


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
