"""The three kinds of step on torch's fused kernels, on a CPU; each for plain momentum and for Adam."""

from typing import Any

import torch
from torch import Tensor

from momo_hf.optim.kernels.fused import Fused, FusedAdam, FusedMomentum, memory, sgd
from momo_hf.optim.steps.kind import Tensors
from momo_hf.optim.steps.modelled import left_by


class FusedModelled(Fused):
    """The step of `Modelled`."""

    def first_of(self, tensors: Tensors) -> tuple[Tensor, ...]:
        norm = self.absorb(tensors)
        overlap = torch.dot(tensors["exp_avg"], tensors["param"]) if self.how.decays else self.zero
        return norm, overlap, self.zero

    def second_of(self, tensors: Tensors, numbers: tuple[Any, ...]) -> tuple[Tensor, ...]:
        (factor, decay, ok), param = numbers, tensors["param"]
        if ok:
            if self.how.decays and not self.how.divide:
                param.mul_(1 - decay)
            self.move(tensors, "param", factor)
            if self.how.decays and self.how.divide:
                param.div_(1 + decay)
        return left_by(tensors["exp_avg"], param, self.how, self.zero)


class FusedAveraged(Fused):
    """The step of `Averaged`."""

    vector = "grad"
    rho = 1.0  # a gradient is no average

    @property
    def bound(self) -> float | None:  # type: ignore[override]
        return self.how.bound

    def first_of(self, tensors: Tensors) -> tuple[Tensor, ...]:
        grad, shrinks = tensors["grad"], self.how.decays and self.how.divide
        norm, step = self.absorb(tensors), torch.dot(grad, tensors["ahead"])
        return norm, step, torch.dot(grad, tensors["y"]) + step if shrinks else self.zero, self.zero

    def second_of(self, tensors: Tensors, numbers: tuple[Any, ...]) -> tuple[Tensor, ...]:
        to_x, reach, decay, to_y, kept, ok = numbers
        ahead, y, pull = tensors["ahead"], tensors["y"], self.how.interpolation * decay
        u = self.kept(tensors)
        if ok and u is not None and kept and not self.how.decays:
            # As below, in other words: z - y <- kept (z - y) - kept reach u, and y from what it is then.
            sgd(y, u, [ahead], lr=-(to_x + to_y) / kept, momentum=kept, dampening=1 + kept * reach)
            y.add_(u, alpha=to_x * reach)
        elif ok:
            pulls = y * pull if self.how.decays and not self.how.divide else None
            y.add_(ahead, alpha=to_x)  # x
            self.move(tensors, "ahead", reach)
            if pulls is not None:
                ahead.sub_(pulls)
            elif self.how.decays:
                ahead.add_(y, alpha=-pull).div_(1 + decay)
            y.add_(ahead, alpha=to_y)
            ahead.mul_(kept)
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

    def first_of(self, tensors: Tensors) -> tuple[Tensor, ...]:
        grad, step = tensors["grad"], self.now.step
        before = memory.scratch(grad.numel())
        if step > 1:
            self.apply(tensors, before, "exp_avg", -1.0, step - 1, decay=-1.0)  # ρ_{k-1} u_{k-1}
        norm = self.absorb(tensors) / self.rho
        # Here, because Adam's kernel waits less for a gradient from memory than an inner product does.
        slope = torch.dot(grad, before) / self.rho_at(float(step) - 1) if step > 1 else self.zero
        scaled = memory.spare(grad.numel())
        self.apply(tensors, scaled, "grad", -1.0, step, decay=-1.0)  # D^{-1} g
        return slope, norm, torch.dot(grad, scaled)

    def second_of(self, tensors: Tensors, numbers: tuple[Any, ...]) -> tuple[Tensor, ...]:
        (size, ok, back, begins), param, origin = numbers, tensors["param"], tensors["origin"]
        if begins:
            origin.copy_(param)
        if back:
            param.copy_(origin)
            for name in ("exp_avg", *self.method.buffers):
                tensors[name].zero_()
        if ok:
            self.move(tensors, "param", size)
        return ()
