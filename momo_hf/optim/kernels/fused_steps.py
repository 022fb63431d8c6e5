"""The three kinds of step on torch's fused kernels, on a CPU; each for plain momentum and for Adam."""

from functools import cached_property

import torch
from torch import Tensor

from momo_hf.optim.kernels.fused import DIRECTION, Fused, FusedAdam, FusedMomentum, workspace
from momo_hf.optim.steps.elementwise import inner_product


class FusedModelled(Fused):
    """The step of `Modelled`."""

    def first(self) -> Tensor:
        norms, overlaps = [], []
        averages = ("exp_avg", *self.method.buffers)
        for batch in self.batches if self.usable else ():
            tensors = batch.lists(("grad", *averages, *(("param",) if self.how.decays else ())))
            norms += self.absorb(batch, tensors)
            if self.how.decays:
                overlaps += batch.products(tensors, "exp_avg", "param")
            batch.put_back(tensors, averages)
        return self.sums(norms, overlaps, []) / torch.tensor([self.rho, 1.0, 1.0])

    def second(self, numbers: tuple[Tensor, ...]) -> Tensor:
        (factor, decay, ok), bucket = numbers, self.bucket
        left, lost, rounds = [], [], bucket.stored != bucket.dtype
        for batch in self.batches:
            tensors = batch.lists(("param", "exp_avg", *self.method.buffers))
            if ok:
                if self.how.decays and not self.how.divide:
                    torch._foreach_mul_(tensors["param"], 1 - float(decay))
                self.move(batch, tensors, "param", "exp_avg", float(factor) / self.rho)
                if self.how.decays and self.how.divide:
                    torch._foreach_div_(tensors["param"], 1 + float(decay))
            if rounds:
                for momentum, param in zip(tensors["exp_avg"], tensors["param"]):
                    rounded = param.to(bucket.stored).to(param.dtype)
                    left.append(inner_product(momentum, rounded))
                    lost.append(inner_product(momentum, rounded - param))
            else:
                left += batch.products(tensors, "exp_avg", "param")
            batch.put_back(tensors, ("param",))
        torch.autograd.graph.increment_version(bucket.roles["param"])  # a fused kernel does not
        zero = torch.zeros_like(self.now.weight)
        return torch.stack([torch.stack(column).sum() if column else zero for column in (left, lost)])


class FusedAveraged(Fused):
    """The step of `Averaged`."""

    def first(self) -> Tensor:
        norms, steps, overlaps, buffers = [], [], [], self.method.buffers
        shrinks = self.how.decays and self.how.divide
        for batch in self.batches if self.usable else ():
            tensors = batch.lists(("grad", "ahead", *buffers, *(("y",) if shrinks else ())))
            norms += self.absorb_gradient(batch, tensors)
            steps += batch.products(tensors, "grad", "ahead")
            if shrinks:
                overlaps += batch.products(tensors, "grad", "y")
            batch.put_back(tensors, buffers)
        return self.sums(norms, steps, [*overlaps, *steps] if shrinks else [], [])

    def second(self, numbers: tuple[Tensor, ...]) -> Tensor:
        to_x, reach, decay, to_y, kept, ok = map(float, numbers)
        pull = self.how.share * decay
        for batch in self.batches if ok else ():
            tensors = batch.lists(("grad", "ahead", "y", *self.method.buffers))
            ahead, y = tensors["ahead"], tensors["y"]
            pulls = torch._foreach_mul(y, pull) if self.how.decays and not self.how.divide else None
            torch._foreach_add_(y, ahead, alpha=to_x)  # x
            self.move(batch, tensors, "ahead", "grad", reach)
            if pulls is not None:
                torch._foreach_sub_(ahead, pulls)
            elif self.how.decays:
                torch._foreach_add_(ahead, y, alpha=-pull)
                torch._foreach_div_(ahead, 1 + decay)
            torch._foreach_add_(y, ahead, alpha=to_y)
            torch._foreach_mul_(ahead, kept)
            batch.put_back(tensors, ("ahead", "y"))
            if self.bucket.stored != self.bucket.dtype:
                for part in batch.parts:
                    part.write("param", part.read("y"))
        torch.autograd.graph.increment_version(self.bucket.roles["param"])
        return self.now.weight.new_zeros(0)


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

    @cached_property
    def rho_before(self) -> float:
        """ρ_{k-1}."""
        return 1.0 if self.now.rho_before is None else float(self.now.rho_before)

    def first(self) -> Tensor:
        slopes, norms, samples = [], [], []
        averages, begins = ("exp_avg", *self.method.buffers), float(self.now.step) == 1
        for batch in self.batches if self.usable else ():
            tensors, size = batch.lists(("grad", *averages)), sum(batch.numels)
            if not begins:
                direction = workspace(DIRECTION, size).zero_()  # u_{k-1}
                into = batch.like(tensors["grad"], direction)
                self.apply(batch, tensors, into, "exp_avg", -1 / self.rho_before, self.now.step - 1)
                slopes += batch.products_with(tensors, "grad", direction)
            norms += self.absorb(batch, tensors)
            direction = workspace(DIRECTION, size).zero_()  # D^{-1} g
            self.apply(batch, tensors, batch.like(tensors["grad"], direction), "grad", -1.0, self.now.step)
            samples += batch.products_with(tensors, "grad", direction)
            batch.put_back(tensors, averages)
        return self.sums(slopes, norms, samples) / torch.tensor([1.0, self.rho**2, 1.0])

    def second(self, numbers: tuple[Tensor, ...]) -> Tensor:
        (size, ok, back, begins), roles = numbers, self.bucket.roles
        if begins:
            torch._foreach_copy_(roles["origin"], roles["param"])
        if back:
            torch._foreach_copy_(roles["param"], roles["origin"])
            for name in ("exp_avg", *self.method.buffers):
                torch._foreach_zero_(roles[name])
        for batch in self.batches if ok else ():
            tensors = batch.lists(("param", "exp_avg", *self.method.buffers))
            self.move(batch, tensors, "param", "exp_avg", float(size) / self.rho)
            batch.put_back(tensors, ("param",))
        torch.autograd.graph.increment_version(roles["param"])
        return self.now.weight.new_zeros(0)
