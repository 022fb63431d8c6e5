"""Averaging of the iterates (schedule-free): its step, and two modes of the parameters; scalars are in `averaged_model`.

In train mode a parameter holds y = (1-β) z + β x, the point where loss and gradient are taken; in eval mode it holds x, the
average, which is to be evaluated and saved. Beside it stands z - y, so that each of the three follows from the other two:

    x = y - (1/β - 1) (z - y)

A parameter in bfloat16 or float16 cannot hold the small changes of y, so y is stored for it too.
"""

from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from momo_hf.optim.kernels import scalars
from momo_hf.optim.method import Method
from momo_hf.optim.record import Group, Record, params_of
from momo_hf.optim.steps.arithmetic import divided, full_like, like, maximum, where
from momo_hf.optim.steps.averaged_model import AveragedStep, AveragedSums, AverageState
from momo_hf.optim.steps.elementwise import bounded, buffers_of, corrected, inner_product, lerp, take_in, zero_unless
from momo_hf.optim.steps.given import Beginning, Given, settings_of
from momo_hf.optim.steps.kind import Access, How, Kind, Now, Tensors
from momo_hf.optim.steps.modelled import MODEL
from momo_hf.optim.steps.outside import Outside
from momo_hf.optim.steps.ramp import SEARCH
from momo_hf.optim.tensors.buckets import Bucket
from momo_hf.optim.tensors.sharding import Layout


AVERAGES = Record(AverageState)


class Form(NamedTuple):
    """How iterates are averaged where nobody says otherwise.

    Attributes:
        interpolation: β of y, where `averaging` is True.
        power: r of the weights w = k^r (largest τ so far)²; the average is mostly of the last 1 / (r+1) of the steps.
        polyak: p, what Polyak's step is multiplied by after a search.
    """

    interpolation: float
    power: int
    polyak: float

    def kept(self) -> Group:
        """What a group keeps of it, so that a saved state goes on as it began."""
        return {"averaging_power": self.power, "polyak_factor": self.polyak}


# All chosen by runs of 1,000 steps with a search, see configs/sweeps/README.md. Twice Polyak's step leads to the minimum along u
# where the loss is quadratic, and <g, D^{-1} g> holds the noise of the gradients whole. But a cap that was only given may be
# far too high, and then nothing else bounds the step.
ALONG_GRADIENTS = Form(interpolation=0.7, power=3, polyak=2.0)
ALONG_MOMENTUM = Form(interpolation=0.5, power=1, polyak=1.0)

EVAL_MODE = (
    "{name}.step() was called in eval mode, where the parameters hold the averaged weights, so the gradients were taken "
    "at the wrong point. Call optimizer.train() before the forward passes of training, and optimizer.eval() before "
    "evaluating or saving. Trainer calls both."
)


class Averaged(Kind):
    """The step that averages the iterates, where the groups have `averaging`.

    This is schedule-free learning (Defazio et al. 2024) with a Polyak step (Gower, Loizou 2025). z takes the steps, x is the
    average of the z, weighted by w, k^r times the squared largest τ so far, and loss and gradient are taken at y between them:

        y = (1-β) z + β x,    τ = min(lr, p avg[f(y) - lb + <g, z - y>]_+ / avg<g, D^{-1} g>)
        z <- (z - τ D^{-1} g) / (1 + lr λ),    x <- x + (w / Σ w) (z - x)

    β is `averaging`, or 0.7 where that is True; r is 3; p is 2 after a search for the cap, and 1 where there was none; the
    averages in τ have the method's own β1. A method with `keeps_momentum` goes along u = direction(d̂) of the momentum of the
    gradients at y instead of D^{-1} g. In an optimizer that has one True stands for 0.5, and r and p are 1.

    A row of a table of embeddings that is looked up in a share q of the steps has a v of q times its g², so that along a
    gradient alone its steps are 1/√q caps, and it learns its few samples by heart. In the `tables` of a group, places in its
    `params`, the entries of u are at most 2 with Adam (`Method.table_bound`). `mark_tables` finds them; `Accelerator.prepare`
    and Trainer call it.

    After a search in which `embeddings` learnt, tied ones too, the other parameters have half of the cap with Adam
    (`Method.others_share`): embeddings bear longer steps, and the ramp sees what the whole model bears.

    The parameters hold y in training, and x from `optimizer.eval()` to `optimizer.train()`. x is what is to be evaluated,
    sampled from and saved. Trainer does so by itself; in other loops both calls stand beside those of the model, on every
    process:

        model.train(), optimizer.train()  # before the forward passes of training; a new optimizer is in this mode
        model.eval(), optimizer.eval()  # before evaluating and saving, and at the end of training

    A step in eval mode is an error. The mode is a part of the state, so load model and optimizer from one checkpoint.

    * lr: no schedule is needed after the warmup, and one that falls is not followed: the largest `lr` so far counts. (In one
      that ends at 0 the weights w would not fall with it, so that the last z, which hardly differ, would count like all others.)
    * Decay acts on z (proximal), or with `divide=False` on y, as in schedule-free AdamW.
    * Memory: that of the method without averaging; in bfloat16 and float16 4 bytes a parameter more, for y.
    * Others' averages of the parameters (EMA) are averages of y: leave them out. BatchNorm's statistics are those of y:
      before evaluating, run some batches in `model.train()` after `optimizer.eval()`.
    * Changes from outside, see `outside`: x, y and z go on from weights that are loaded in eval mode. In train mode masks
      hold; clamps, projections and averages over workers (LocalSGD) hold for y alone, which is said. ZeRO is refused.
    """

    # <g, u>, <g, z - y>, <g, z> where it counts, see `averaged_model`
    SUMS = ("norm_sq", "ahead", "overlap", "written")

    def __init__(self) -> None:
        self.outside = Outside()

    # ---- The passes ----

    @staticmethod
    def roles(method: Method) -> tuple[str, ...]:
        return ("y", "ahead", *averages_of(method))

    @staticmethod
    def first_access(method: Method, how: How) -> Access:
        reads = ("grad", "ahead", *averages_of(method), *(("y",) if how.decays and how.divide else ()))
        return Access(reads, averages_of(method) if how.finite_known else ())

    @staticmethod
    def second_access(method: Method, how: How) -> Access:
        averages = averages_of(method)
        written = () if how.finite_known and how.moves else averages
        if not how.moves:
            return Access(("grad", *averages), written)
        rounds = how.stored != torch.promote_types(how.stored, torch.float32)
        return Access(("grad", "ahead", "y", *averages), (*written, "ahead", "y", *(("param",) if rounds else ())))

    @staticmethod
    def first(method: Method, tensors: Tensors, now: Now, how: How) -> tuple[Tensor, ...]:
        grad, ahead, zero = tensors["grad"], tensors["ahead"], torch.zeros_like(now.weight)
        if now.inputs_valid is None:
            buffers = method.update(grad, buffers_of(method, tensors), now.options)
            momentum = lerp(tensors["exp_avg"], grad, now.weight) if method.keeps_momentum else None
            new = [*buffers.values(), *([] if momentum is None else [momentum])]
            written = sum((value.sum() for value in new), zero)
        else:
            take_in(method, tensors, now, now.inputs_valid, momentum=method.keeps_momentum)
            buffers, momentum, written = buffers_of(method, tensors), tensors.get("exp_avg"), zero
        vector = grad if momentum is None else corrected(momentum, now.correction)
        direction = bounded(method.direction(vector, buffers, now.options), how.bound)  # u
        if method.costly:
            tensors["direction"] = direction
        step = inner_product(grad, ahead)
        overlap = inner_product(grad, tensors["y"]) + step if how.decays and how.divide else zero
        return inner_product(grad, direction), step, overlap, written

    @staticmethod
    def second(
        method: Method, tensors: Tensors, now: Now, how: How, numbers: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        to_x, reach, decay, to_y, kept, ok = numbers
        if not (how.finite_known and how.moves):
            take_in(method, tensors, now, ok, momentum=method.keeps_momentum)
        if not how.moves:
            return ()
        direction = tensors.get("direction")
        if direction is None:
            vector = corrected(tensors["exp_avg"], now.correction) if method.keeps_momentum else tensors["grad"]
            direction = bounded(method.direction(vector, buffers_of(method, tensors), now.options), how.bound)
        y, ahead = tensors["y"], tensors["ahead"]
        pull = y * (how.interpolation * decay) if how.decays and not how.divide else None
        y.addcmul_(ahead, to_x)  # x
        ahead.addcmul_(zero_unless(ok, direction), reach, value=-1)
        if pull is not None:
            ahead.sub_(pull)
        elif how.decays:
            ahead.addcmul_(y, how.interpolation * decay, value=-1).div_(1 + decay)  # now it is β (z_{k+1} - x)
        y.addcmul_(ahead, to_y)
        ahead.mul_(kept)
        if how.stored != y.dtype:
            tensors["param"] = y
        return ()

    # ---- The scalars ----

    def begin(self, groups: list[Group], given: Given, norm: Tensor | None) -> Beginning:
        return scalars.begin(MODEL.first(groups), given, norm, settings_of(groups[0]))

    def beside(
        self, params: list[Tensor], buckets: list[Bucket], layouts: Mapping[Layout | None, bool], like: Tensor
    ) -> dict[Layout | None, Tensor]:
        return self.outside.begun(layouts, like)

    def decide(
        self, groups: list[Group], given: Given, beginning: Beginning, sums: Tensor, beside: Tensor
    ) -> AveragedStep:
        before, averages = MODEL.read(groups), AVERAGES.read(groups)
        if self.outside.begins:
            # Where most of the model began anew, what is averaged does too: no process may decide that alone.
            kept = 2 * beside <= sum(p.numel() for p in params_of(groups))
            averages = AverageState(*(torch.where(kept, value, 0.0) for value in averages))
            self.outside.after_step()
        head, found = groups[0], AveragedSums(*sums.unbind())
        how = {"power": head["averaging_power"], "polyak": head["polyak_factor"] if SEARCH.stands_in(head) else 1.0}
        taken = scalars.next_averaged_step(
            before, averages, given, found, beginning.inputs_valid, settings_of(head), **how
        )
        model, averages, update = taken
        MODEL.write(groups, model)
        AVERAGES.write(groups, averages)
        return update

    @staticmethod
    def numbers(update: AveragedStep, bucket: Bucket, now: Now) -> tuple[Tensor, ...]:
        """With c the weight of the new z in x, and β (z_{k+1} - x) between the two lines:

        y <- y - (1/β - 1) (z - y),    y <- y + (1/β - 1 + c) β (z - y),    z - y <- (1 - c) β (z - x)
        """
        interpolation, weight = bucket.group["averaging"], update.weight
        if bucket.start is not None:
            # The average of parameters that joined a running model is that of their own steps, weighted by their own k.
            # Steps never fall, so that this is less than w / Σ w for those that were there from the start.
            own = own_weight(like(weight, now.step), bucket.group["averaging_power"])
            weight = where(update.accepted, maximum(weight, own), weight)
        back = where(update.accepted, full_like(weight, 1 / interpolation - 1), 0.0)
        factor, decay = update.factor.select(0, bucket.column), update.decay.select(0, bucket.column)
        return -back, factor * interpolation, decay, back + weight, 1 - weight, update.accepted


def averages_of(method: Method) -> tuple[str, ...]:
    """The entries of a parameter's state that take in its gradients."""
    return (*(("exp_avg",) if method.keeps_momentum else ()), *method.buffers)


def own_weight(step: Tensor, power: int) -> Tensor:
    """k^r / Σ k^r, 0-dim, for an r of 1 or 3: the sum of cubes is the square of the sum."""
    return divided(step**power, (step * (step + 1) / 2) ** ((power + 1) // 2))


def form_of(methods: Mapping[str, Method]) -> Form:
    """How an optimizer with these methods averages."""
    return ALONG_MOMENTUM if any(method.keeps_momentum for method in methods.values()) else ALONG_GRADIENTS


def others_share_of(methods: Mapping[str, Method]) -> float:
    """What of a cap that was found counts beside embeddings, see `Method.others_share`; all of it beside momentum."""
    return 1.0 if form_of(methods) is ALONG_MOMENTUM else min(method.others_share for method in methods.values())


def interpolation_of(averaging: bool | float, default: float = ALONG_GRADIENTS.interpolation) -> bool | float:
    """β for the option `averaging`, or False; `default` where it is True.

    Raises:
        ValueError: it is neither a flag nor a number between 0 and 1.
    """
    if averaging is True or averaging is False:
        return averaging and default
    if not (isinstance(averaging, Real) and 0 < averaging < 1):
        raise ValueError(
            "`averaging` must be True, False or a number in (0, 1), the share of the average in the point where gradients "
            f"are taken, got {averaging!r}. True stands for {default}."
        )
    return float(averaging)


def check_averaging(group: dict[str, Any]) -> None:
    """Raise a ValueError for an option of a parameter group that does not go with averaging."""
    if not interpolation_of(group["averaging"]):
        return
    if group.get("use_fstar", False):
        raise ValueError(
            "`use_fstar` must be False with averaging, got True: the step that averages has no momentum, whose model the "
            "estimate of the lower bound is made for."
        )
