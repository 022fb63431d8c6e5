"""The ramp: steps of growing size that find the cap, and then take themselves back. The rule that ends it is in `search`.

During a ramp a parameter that has had a gradient moves at every step, with a gradient of 0 where it has none, so that the
parameters have done exactly what the last direction said. Parameters that join on the way count the steps of all.

After the last step parameters, momentum and buffers are as if nothing had been, and training begins with a warmup as long as
the search, see `cap`. `lr` is then the cap that was found, see `auto`: a schedule acts on it, and groups may be given their shares.
What looks at the weights sees them go back once:

* an average of the weights (EMA) and an evaluation see the steps of the search as long as it lasts, and a training that ends
  before it has learnt nothing. Whatever else writes to parameters meanwhile is undone with them.
* statistics that follow the weights, as BatchNorm's, are not the optimizer's, and keep what they saw until training has
  overwritten them: with the usual momentum of 0.1 within eighty steps.
* a copy of the parameters, as large as they are, is held and saved with the state until the search is over.
* with `averaging` there is nothing to average before: `eval()` and `train()` leave the weights as they are, and the average
  begins where the search began.

Every step of the search decides on the device whether it was the last one, which then takes everything back. The host hears
of it at the beginning of the next step, when the forward and backward passes are already under way, so that it does not
wait; the gradient of that step was taken where the search began, and with it training begins.
"""

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from momo_hf.optim.kernels import scalars
from momo_hf.optim.method import Method
from momo_hf.optim.record import Group, Record
from momo_hf.optim.steps.elementwise import averages_after, buffers_of, corrected, inner_product, take_in
from momo_hf.optim.steps.given import Beginning, Given, settings_of
from momo_hf.optim.steps.kind import Access, How, Kind, Now, Tensors
from momo_hf.optim.steps.modelled import MODEL
from momo_hf.optim.steps.search import Move, SearchState
from momo_hf.optim.tensors.buckets import Bucket, method_of
from momo_hf.optim.tensors.sharding import local


# In a parameter group; one without it has an lr that was given.
SEARCH = Record(SearchState, "search_")
# The entry of a parameter's state that holds its value from before the search.
ORIGIN = "origin"
# That of its last direction u_{k-1}, where the method is costly.
LAST = "last_direction"


class Ramp(Kind):
    """x <- x - α_k u_k; or back to the origin, with momentum and buffers at 0.

    Args:
        methods: of the optimizer.
    """

    SUMS = ("slope", "norm", "sample")  # <g_k, u_{k-1}>, <d̂_k, u_k>, <g_k, D_k^{-1} g_k>
    looks_back = moves_all = True

    def __init__(self, methods: Mapping[str, Method]) -> None:
        self.methods = methods

    @staticmethod
    def roles(method: Method) -> tuple[str, ...]:
        return ("exp_avg", ORIGIN, *method.buffers, *last_of(method))

    @staticmethod
    def first_access(method: Method, how: How) -> Access:
        averages = ("exp_avg", *method.buffers)
        return Access(("grad", *averages, *last_of(method)), averages if how.finite_known else ())

    @staticmethod
    def second_access(method: Method, how: How) -> Access:
        written = ("param", ORIGIN, "exp_avg", *method.buffers, *last_of(method))
        return Access(written if how.finite_known else ("grad", *written), written)

    @staticmethod
    def first(method: Method, tensors: Tensors, now: Now, how: How) -> tuple[Tensor, ...]:
        grad = tensors["grad"]
        before = tensors.get(LAST)  # u_{k-1}
        if before is None:
            before = corrected(tensors["exp_avg"], now.correction_before)
            before = method.direction(before, buffers_of(method, tensors), now.options_before or now.options)
        slope = inner_product(grad, before)
        if now.inputs_valid is None:
            momentum, buffers = averages_after(method, tensors, now)
        else:
            take_in(method, tensors, now, now.inputs_valid)
            momentum, buffers = tensors["exp_avg"], buffers_of(method, tensors)
        momentum = corrected(momentum, now.correction)
        direction = method.direction(momentum, buffers, now.options)  # u_k
        if method.costly:
            tensors["direction"] = direction
        return slope, inner_product(momentum, direction), method.sample(grad, momentum, buffers, now.options)

    @staticmethod
    def second(
        method: Method, tensors: Tensors, now: Now, how: How, numbers: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        size, ok, back, begins = numbers
        averages = {name: tensors[name] for name in ("exp_avg", *method.buffers)}
        if not how.finite_known:
            momentum, buffers = averages_after(method, tensors, now)
            new = {"exp_avg": momentum, **buffers}
            averages |= {name: torch.where(ok, value, tensors[name]) for name, value in new.items()}
        direction = tensors.get("direction")
        if direction is None:
            buffers = {name: averages[name] for name in method.buffers}
            direction = method.direction(corrected(averages["exp_avg"], now.correction), buffers, now.options)
        if LAST in tensors:
            averages[LAST] = torch.where(ok, direction, tensors[LAST])
        param = tensors["param"]
        origin = torch.where(begins, param, tensors[ORIGIN])
        tensors[ORIGIN] = origin
        tensors["param"] = torch.where(back, origin, torch.where(ok, param - size * direction, param))
        for name, value in averages.items():
            tensors[name] = torch.where(back, 0.0, value)
        return ()

    def begin(self, groups: list[Group], given: Given, norm: Tensor | None) -> Beginning:
        return scalars.begin(SEARCH.first(groups), given, norm, settings_of(groups[0]))

    def decide(self, groups: list[Group], given: Given, beginning: Beginning, sums: Tensor, beside: Tensor) -> Move:
        group, model = groups[0], MODEL.read(groups)
        slope, norm, sample = sums.sum(1).unbind()
        norm = norm / beginning.inputs_valid  # not finite where the step is to be dropped, as for an `lr` that is NaN
        state, move = scalars.next_move(
            SEARCH.read(groups),
            given.loss,
            slope,
            norm,
            sample,
            lb=group["lb"],
            start=method_of(group, self.methods).ramp_start,
            clip_factor=given.clip_factor,
        )
        SEARCH.write(groups, state)
        MODEL.write(groups, model._replace(skipped=model.skipped + (state.dropped > 0)))
        return move

    @staticmethod
    def numbers(update: Move, bucket: Bucket, now: Now) -> tuple[Tensor, ...]:
        return update.size, update.accepted, update.back, update.begins


# ---- The state ----


def last_of(method: Method) -> tuple[str, ...]:
    """The entry of the last direction, where it would be dear to form it again."""
    return (LAST,) if method.costly else ()


def first_origin(param: Tensor, method: Method) -> dict[str, Tensor]:
    """What a parameter has that gets its first gradient during a search: a momentum, the origin, perhaps a last direction."""
    dtype = torch.promote_types(param.dtype, torch.float32)
    zeros = {name: torch.zeros_like(param, dtype=dtype) for name in ("exp_avg", *last_of(method))}
    return zeros | {ORIGIN: param.detach().to(dtype, copy=True)}


def resume_ramp(state: MutableMapping[Tensor, dict[str, Tensor]], searches: bool, averages: bool) -> None:
    """Leave in a state what the coming steps need. After a search the momentum is 0, and so is the z - y of an average that
    begins.

    Args:
        state: per parameter.
        searches: whether the search goes on.
        averages: whether the iterates are averaged.
    """
    for entry in state.values():
        if searches:
            entry.pop("ahead", None)
            entry.pop("y", None)
            if "z" in entry:  # the origin, before z - y took the place of z
                entry[ORIGIN] = entry.pop("z")
            continue
        entry.pop(ORIGIN, None)
        entry.pop(LAST, None)
        if averages and "z" not in entry and "ahead" not in entry:
            entry["ahead"] = entry.pop("exp_avg")


def with_origins(state_dict: dict[str, Any], params: Iterable[Tensor], averages: bool) -> dict[str, Any]:
    """A state that has the same entries during a search and after it, where one tensor stands for those that are gone.

    torch.distributed.checkpoint fills the state of a fresh optimizer, which cannot know what is going to come.
    """
    names = (ORIGIN, LAST, "exp_avg", *(("ahead",) if averages else ()))
    entries = {}
    for p, (key, entry) in zip(params, state_dict["state"].items()):
        stands = entry["ahead"] if "ahead" in entry else entry["exp_avg"]
        # An average begins at the origin.
        y = {"y": entry[ORIGIN]} if averages and ORIGIN in entry and p.dtype.itemsize < 4 else {}
        entries[key] = dict.fromkeys(names, stands) | y | entry
    return {**state_dict, "state": entries}


def check_origins(state_dict: dict[str, Any]) -> None:
    """Raise a ValueError if a state from the middle of a search has lost the weights from before it."""
    group = state_dict["param_groups"][0]
    if not SEARCH.stands_in(group) or float(group["search_ended"]):
        return
    for entry in state_dict["state"].values():
        # Before z - y there was z, which is where the search began.
        names = ("z" if "z" in entry else ORIGIN, "exp_avg")
        origin, momentum = (local(entry[name]) if name in entry else None for name in names)
        if origin is None or momentum is None or (origin.numel() and origin.data_ptr() == momentum.data_ptr()):
            raise ValueError(
                "This state was saved while a search for the cap went on, and lacks the weights from before it: it was "
                "filled into the state of an optimizer whose search is over. Load it into a fresh optimizer."
            )
