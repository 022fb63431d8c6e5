"""The step of the paper: along the momentum, as far as the model of the loss goes. Its scalars are in `model`."""

from collections.abc import Mapping

from torch import Tensor, zeros_like

from momo_hf.optim.kernels import scalars
from momo_hf.optim.method import Method
from momo_hf.optim.record import Group, Record
from momo_hf.optim.steps.elementwise import (
    averages_after,
    buffers_of,
    corrected,
    inner_product,
    take_in,
    zero_unless,
)
from momo_hf.optim.steps.given import Beginning, Given, settings_of
from momo_hf.optim.steps.kind import Access, How, Kind, Now, Tensors
from momo_hf.optim.steps.model import ModelState, Step, Sums, with_drift
from momo_hf.optim.steps.movement import Movement
from momo_hf.optim.tensors.buckets import Bucket
from momo_hf.optim.tensors.sharding import Layout


MODEL = Record(ModelState)


class Modelled(Kind):
    """x <- (x - τ u) / (1 + a) with u = direction(d̂), or AdamW's x <- (1 - a) x - τ u where not `divide`."""

    SUMS = Sums._fields  # <d, u>, <d, x> where it decays, |g|² where not `finite_known`
    LEFT = ("overlap", "lost")  # <d, x> after the step, and <d, what rounding x to its dtype added>

    def __init__(self) -> None:
        self.movement = Movement()

    @staticmethod
    def roles(method: Method) -> tuple[str, ...]:
        return ("exp_avg", *method.buffers)

    @staticmethod
    def first_access(method: Method, how: How) -> Access:
        averages = ("exp_avg", *method.buffers)
        return Access(("grad", *averages, *(("param",) if how.decays else ())), averages if how.finite_known else ())

    @staticmethod
    def second_access(method: Method, how: How) -> Access:
        averages, taken = ("exp_avg", *method.buffers), how.finite_known and how.moves
        reads = (*(() if taken else ("grad",)), *averages, "param")
        return Access(reads, (*(() if taken else averages), *(("param",) if how.moves else ())))

    @staticmethod
    def first(method: Method, tensors: Tensors, now: Now, how: How) -> tuple[Tensor, ...]:
        zero = zeros_like(now.weight)
        if now.inputs_valid is None:
            size = inner_product(tensors["grad"], tensors["grad"])
            momentum, buffers = averages_after(method, tensors, now)
        else:
            take_in(method, tensors, now, now.inputs_valid)
            size, momentum, buffers = zero, tensors["exp_avg"], buffers_of(method, tensors)
        direction = method.direction(corrected(momentum, now.correction), buffers, now.options)  # u
        if method.costly:
            tensors["direction"] = direction
        return (
            inner_product(momentum, direction),
            inner_product(momentum, tensors["param"]) if how.decays else zero,
            size,
        )

    @staticmethod
    def second(
        method: Method, tensors: Tensors, now: Now, how: How, numbers: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        factor, decay, ok = numbers  # 0 unless ok; the direction may then be NaN
        if not (
            how.finite_known and how.moves
        ):  # without gradients there was no first pass, and the averages take in 0
            take_in(method, tensors, now, ok)
        momentum, param = tensors["exp_avg"], tensors["param"]
        if how.moves:
            direction = tensors.get("direction")
            if direction is None:
                direction = method.direction(
                    corrected(momentum, now.correction), buffers_of(method, tensors), now.options
                )
            if how.decays and not how.divide:
                param.mul_(1 - decay)
            param.addcmul_(zero_unless(ok, direction), factor, value=-1)
            if how.decays and how.divide:
                param.div_(1 + decay)
        return left_by(momentum, param, how, zeros_like(now.weight))

    def begin(self, groups: list[Group], given: Given, norm: Tensor | None) -> Beginning:
        return scalars.begin(MODEL.first(groups), given, norm, settings_of(groups[0]))

    def beside(
        self, params: list[Tensor], buckets: list[Bucket], layouts: Mapping[Layout | None, bool], like: Tensor
    ) -> dict[Layout | None, Tensor]:
        # How far something else has moved the parameters since the last step: `strayed` in `model`.
        return self.movement.since_last_step(params, buckets, layouts, like)

    def decide(self, groups: list[Group], given: Given, beginning: Beginning, sums: Tensor, beside: Tensor) -> Step:
        state = MODEL.read(groups)
        found, settings = Sums(*sums.unbind()), settings_of(groups[0])
        state, update = scalars.next_step(state, given, found, beside, beginning.inputs_valid, settings)
        MODEL.write(groups, state)
        return update

    @staticmethod
    def numbers(update: Step, bucket: Bucket, now: Now) -> tuple[Tensor, ...]:
        return update.factor.select(0, bucket.column), update.decay.select(0, bucket.column), update.accepted

    def finish(
        self,
        groups: list[Group],
        params: list[Tensor],
        left: dict[Layout | None, Tensor],
        layouts: Mapping[Layout | None, bool],
    ) -> None:
        lost = self.movement.after_step(params, left, layouts)
        if lost is not None:
            MODEL.write(groups, with_drift(MODEL.read(groups), lost))


def left_by(momentum: Tensor, param: Tensor, how: How, zero: Tensor) -> tuple[Tensor, Tensor]:
    """<d, x> for the parameter as it will be stored, and <d, what its rounding adds>."""
    if how.stored == param.dtype:
        return inner_product(momentum, param), zero
    rounded = as_stored(param, how)
    return inner_product(momentum, rounded), inner_product(momentum, rounded - param)


def as_stored(param: Tensor, how: How) -> Tensor:
    """The parameter rounded to its dtype."""
    return param.to(how.stored).to(param.dtype)
