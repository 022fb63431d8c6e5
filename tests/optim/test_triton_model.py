"""A formula of the scalars in Triton, run by its interpreter, against the plain one in float64."""

import math

import pytest
import torch


triton, tl = map(pytest.importorskip, ("triton", "triton.language"))
triton_math = pytest.importorskip("momo_hf.optim.kernels.triton_math")


@triton.jit
def corrections(steps, found, log_beta: tl.constexpr):
    place = tl.program_id(0)
    tl.store(found + place, triton_math.debias(tl.load(steps + place), log_beta))


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.99, 0.999])
def test_the_correction_of_a_start_at_0(beta):
    """Against the plain formula in float64, which has more digits than it loses."""
    steps = torch.tensor([1.0, 2.0, 4.0, 10.0, 45.0, 100.0, 480.0, 1000.0])
    found = torch.empty_like(steps)
    corrections[(len(steps),)](steps, found, log_beta=math.log(beta))
    expected = 1 - torch.tensor(beta, dtype=torch.float64) ** steps.double()
    torch.testing.assert_close(found.double(), expected, rtol=5e-7, atol=0)
