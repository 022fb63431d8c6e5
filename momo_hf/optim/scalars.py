"""The scalar side of a step: by `model` in arithmetic on tensors, or by the same formulas in one launch on CUDA."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from momo_hf.optim import model
from momo_hf.optim.kernels import launch
from momo_hf.optim.model import ModelState, Step, acceptable, average_weight
from momo_hf.optim.sharding import whole


class Beginning(NamedTuple):
    """What is known before the first pass; 0-dim tensors.

    Attributes:
        step: k.
        weight: 1-β_k, the weight of its sample in the averages.
        usable: whether the step can be taken, as far as is known.
    """

    step: Tensor
    weight: Tensor
    usable: Tensor


def begin(
    before: Tensor,
    loss: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    clip_factor: Tensor | None,
    norm: Tensor | None,
    *,
    beta: float,
    bias_correction: bool,
) -> Beginning:
    """Begin step k after the count `before`; for the other arguments see `model.acceptable`."""
    if not _in_one_launch(before):
        step = before + 1
        usable = acceptable(loss, lr, weight_decay, clip_factor, norm)
        return Beginning(step, average_weight(step, beta, bias_correction), usable)
    from momo_hf.optim.kernels import triton_model

    step, weight = torch.empty(2, dtype=before.dtype, device=before.device).unbind()
    usable = torch.empty((), dtype=torch.bool, device=before.device)
    given = (before, loss, lr, weight_decay, clip_factor, norm)
    launch.launch(
        triton_model.begin,
        1,
        *(before if value is None else value for value in given),
        *(step, weight, usable),
        len(lr),
        clipped=clip_factor is not None,
        normed=norm is not None,
        beta=beta,
        bias_correction=bias_correction,
        block=_block(len(lr)),
    )
    return Beginning(step, weight, usable)


def next_step(
    state: ModelState,
    loss: Tensor,
    dual_norm_sq: Tensor,
    overlap: Tensor,
    grad_norm_sq: Tensor,
    strayed: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    usable: Tensor,
    *,
    lb: float,
    beta: float,
    bias_correction: bool,
    use_fstar: bool,
    divide: bool,
    clip_factor: Tensor | None = None,
) -> tuple[ModelState, Step]:
    """`model.next_step`, with its arguments and results."""
    how = {"beta": beta, "bias_correction": bias_correction, "use_fstar": use_fstar, "divide": divide}
    if not _in_one_launch(state.step):
        products = (dual_norm_sq, overlap, grad_norm_sq, strayed)
        return model.next_step(state, loss, *products, lr, weight_decay, usable, lb=lb, clip_factor=clip_factor, **how)
    from momo_hf.optim.kernels import triton_model

    groups, fields = len(lr), len(state)
    made = loss.new_empty(fields + 3 * groups)
    new, factor, effective_lr, decay = made.split([fields, groups, groups, groups])
    ok = torch.empty((), dtype=torch.bool, device=loss.device)
    launch.launch(
        triton_model.next_step,
        1,
        *(torch.stack(state), loss, dual_norm_sq, overlap, grad_norm_sq, strayed, lr, weight_decay, usable),
        loss if clip_factor is None else clip_factor,
        *(new, factor, effective_lr, decay, ok),
        lb,
        groups,
        stride=dual_norm_sq.stride(0),
        clipped=clip_factor is not None,
        log_beta=math.log(beta) if beta > 0 else -math.inf,
        block=_block(groups),
        **how,
    )
    return ModelState(*new.unbind()), Step(factor, effective_lr, decay, ok)


def _in_one_launch(like: Tensor) -> bool:
    return like.dtype == torch.float32 and launch.runs_on(like.device)


def _block(groups: int) -> int:
    """Vectors in Triton have a power of two of entries."""
    return 1 << (groups - 1).bit_length()


class Vectors:
    """Options of the parameter groups as vectors on the device, kept for as long as they stay what they are."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[list[float], Tensor]] = {}

    def of(self, param_groups: list[dict[str, Any]], option: str, like: Tensor) -> Tensor:
        """An option of all groups, without a read-back where it is a tensor.

        Args:
            param_groups: the groups.
            option: its key.
            like: for dtype and device.
        """
        values = [group[option] for group in param_groups]
        if any(isinstance(value, Tensor) for value in values):
            return torch.stack([scalar(value, like) for value in values])
        kept = self._kept.get(option)
        if kept is None or kept[0] != values or kept[1].device != like.device or kept[1].dtype != like.dtype:
            if len(set(values)) == 1:  # then nothing has to be copied to the device
                made = like.new_full((len(values),), values[0])
            else:
                made = torch.tensor(values, dtype=like.dtype, device=like.device)
            self._kept[option] = kept = (values, made)
        return kept[1]


def scalar(value: Tensor | float, like: Tensor) -> Tensor:
    """A number, or a tensor with one element, as a 0-dim tensor with dtype and device of another one."""
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=like.dtype, device=like.device)
    return whole(value).to(like.device, like.dtype).reshape(())


def keep(entries: Iterable[tuple[dict[str, Any], str]], values: Iterable[Tensor]) -> None:
    """Write numbers into the tensors that stand under their keys: a CUDA graph reads and writes where it did when it was
    captured. Only what has another device or dtype, or is not there, takes a new place.

    Args:
        entries: for every number the dictionary, mostly a parameter group, and its key.
        values: the numbers, 0-dim.
    """
    entries, values = list(entries), list(values)
    held = [group.get(key) for group, key in entries]
    if all(h is not None and h.device == v.device and h.dtype == v.dtype for h, v in zip(held, values)):
        torch._foreach_copy_(held, values)
    else:
        for (group, key), value in zip(entries, values):
            group[key] = value
