"""The three kinds of step on torch's fused kernels, on a CPU; each for plain momentum and for Adam."""

from typing import Any

import torch

from momo_hf.optim.kernels.fused import Fused, FusedAdam, FusedMomentum, sgd
from momo_hf.optim.kernels.lists import ByRole, inner, memory, size_of, views
from momo_hf.optim.steps.modelled import as_stored


# Below this, of the digits of x too few are left in 1 - (1 + x).
CANCELS = 1e-9


class FusedModelled(Fused):
    """The step of `Modelled`."""

    def first_of(self, tensors: ByRole) -> tuple[float, ...]:
        norm = self.absorb(tensors)
        overlap = inner(tensors["exp_avg"], tensors["param"]) if self.how.decays else 0.0
        return norm, overlap, 0.0

    def second_of(self, tensors: ByRole, numbers: tuple[Any, ...]) -> tuple[float, ...]:
        (factor, decay, ok), params = numbers, tensors["param"]
        if ok:
            if self.how.decays and not self.how.divide:
                torch._foreach_mul_(params, 1 - decay)
            self.move(tensors, "param", factor)
            if self.how.decays and self.how.divide:
                torch._foreach_div_(params, 1 + decay)
        if self.how.stored == self.bucket.dtype:
            return inner(tensors["exp_avg"], params), 0.0
        rounded = [as_stored(param, self.how) for param in params]
        lost = [*torch._foreach_sub(rounded, params)]
        return inner(tensors["exp_avg"], rounded), inner(tensors["exp_avg"], lost)


class FusedAveraged(Fused):
    """The step of `Averaged`."""

    vector = "grad"
    rho = 1.0  # a gradient is no average

    @property
    def bound(self) -> float | None:  # type: ignore[override]
        return self.how.bound

    def first_of(self, tensors: ByRole) -> tuple[float, ...]:
        grad, shrinks = tensors["grad"], self.how.decays and self.how.divide
        norm, step = self.absorb(tensors), inner(grad, tensors["ahead"])
        return norm, step, inner(grad, tensors["y"]) + step if shrinks else 0.0, 0.0

    def second_of(self, tensors: ByRole, numbers: tuple[Any, ...]) -> tuple[float, ...]:
        to_x, reach, decay, to_y, kept, ok = numbers
        ahead, y, pull = tensors["ahead"], tensors["y"], self.how.interpolation * decay
        u = self.kept(tensors)
        if ok and u is not None and kept * reach > CANCELS and not self.how.decays:
            # As below, in other words: z - y <- kept (z - y) - kept reach u, and y from what it is then.
            sgd(y, u, ahead, lr=-(to_x + to_y) / kept, momentum=kept, dampening=1 + kept * reach)
            sgd(y, u, [], lr=-to_x * reach)
        elif ok:
            pulls = torch._foreach_mul(y, pull) if self.how.decays and not self.how.divide else None
            sgd(y, ahead, [], lr=-to_x)  # x
            self.move(tensors, "ahead", reach)
            if pulls is not None:
                torch._foreach_sub_(ahead, pulls)
            elif self.how.decays:
                sgd(ahead, y, [], lr=pull)
                torch._foreach_div_(ahead, 1 + decay)
            sgd(y, ahead, [], lr=-to_y)
            torch._foreach_mul_(ahead, kept)
        if self.bucket.stored != self.bucket.dtype:
            tensors["param"] = y
        return ()


class FusedMomentumModelled(FusedMomentum, FusedModelled):
    """The paper's step of MoMo."""


class FusedMomentumAveraged(FusedMomentum, FusedAveraged):
    """The averaged step of MoMo."""


class FusedAdamModelled(FusedAdam, FusedModelled):
    """The paper's step of MoMo-Adam."""


class FusedAdamAveraged(FusedAdam, FusedAveraged):
    """The averaged step of MoMo-Adam."""


class FusedAdamRamp(FusedAdam):
    """A step of the ramp of MoMo-Adam."""

    def first_of(self, tensors: ByRole) -> tuple[float, ...]:
        grad, step = tensors["grad"], self.step
        before = views(memory.room("unread", size_of(grad)), grad)
        if step > 1:
            self.apply(tensors, before, "exp_avg", -1.0, step - 1, decay=-1.0)  # ρ_{k-1} u_{k-1}
        norm = self.absorb(tensors) / self.rho
        # Here, because Adam's kernel waits less for a gradient from memory than an inner product does.
        slope = inner(grad, before) / self.rho_at(step - 1) if step > 1 else 0.0
        scaled = views(memory.room("spare", size_of(grad)), grad)
        self.apply(tensors, scaled, "grad", -1.0, step, decay=-1.0)  # D^{-1} g
        return slope, norm, inner(grad, scaled)

    def second_of(self, tensors: ByRole, numbers: tuple[Any, ...]) -> tuple[float, ...]:
        (size, ok, back, begins), params, origins = numbers, tensors["param"], tensors["origin"]
        if begins:
            torch._foreach_copy_(origins, params)
        if back:
            torch._foreach_copy_(params, origins)
            for name in ("exp_avg", *self.method.buffers):
                torch._foreach_zero_(tensors[name])
        if ok:
            self.move(tensors, "param", size)
        return ()
