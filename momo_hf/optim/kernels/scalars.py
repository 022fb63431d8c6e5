"""The scalar side of a step: by its formulas, on tensors or on the host, or by the same formulas in one launch on CUDA."""

import math
from typing import Any

import torch
from torch import Tensor

from momo_hf.optim.kernels import launch
from momo_hf.optim.steps import averaged_model, model, search
from momo_hf.optim.steps.arithmetic import for_formulas
from momo_hf.optim.steps.averaged_model import AveragedStep, AveragedSums, AverageState
from momo_hf.optim.steps.given import Beginning, Given, Settings
from momo_hf.optim.steps.model import ModelState, Step, Sums
from momo_hf.optim.steps.search import Move, SearchState


def begin(before: Tensor, given: Given, norm: Tensor | None, settings: Settings) -> Beginning:
    """Begin step k after the count `before`; for `norm` see `model.acceptable`."""
    if not in_one_launch(before):
        before, given, norm, settings = for_formulas(before, before, given, norm, settings)
        weight = model.average_weight(before + 1, settings.beta, settings.bias_correction)
        return Beginning(before + 1, weight, model.acceptable(given, norm))
    from momo_hf.optim.kernels import triton_model

    step, weight = torch.empty(2, dtype=before.dtype, device=before.device).unbind()
    inputs_valid = torch.empty((), dtype=torch.bool, device=before.device)
    numbers = (before, given.loss, given.lr, given.weight_decay, given.clip_factor, norm)
    launch.launch(
        triton_model.begin,
        1,
        *(before if value is None else value for value in numbers),
        *(step, weight, inputs_valid),
        len(given.lr),
        clipped=given.clip_factor is not None,
        normed=norm is not None,
        beta=settings.beta,
        bias_correction=settings.bias_correction,
        block=block_of(len(given.lr)),
    )
    return Beginning(step, weight, inputs_valid)


def next_step(
    state: ModelState, given: Given, sums: Sums, strayed: Tensor, inputs_valid: Tensor, settings: Settings
) -> tuple[ModelState, Step]:
    """`model.next_step`, with its arguments and results."""
    if not in_one_launch(state.step):
        records = state, given, sums, strayed, inputs_valid, settings
        state, given, sums, strayed, inputs_valid, settings = for_formulas(state.step, *records)
        return model.next_step(state, given, sums, strayed, inputs_valid, settings)
    from momo_hf.optim.kernels import triton_model

    beta = settings.beta
    how = {"log_beta": math.log(beta) if beta > 0 else -math.inf, "use_fstar": settings.use_fstar}
    new, step = decide(triton_model.next_step, [*state], given, sums, inputs_valid, settings, strayed, **how)
    return ModelState(*new), Step(*step)


def next_averaged_step(
    model_state: ModelState,
    state: AverageState,
    given: Given,
    sums: AveragedSums,
    inputs_valid: Tensor,
    settings: Settings,
    *,
    power: int,
    polyak: float,
) -> tuple[ModelState, AverageState, AveragedStep]:
    """`averaged_model.next_averaged_step`, with its arguments and results."""
    if not in_one_launch(model_state.step):
        records = model_state, state, given, sums, inputs_valid, settings
        model_state, state, given, sums, inputs_valid, settings = for_formulas(model_state.step, *records)
        return averaged_model.next_averaged_step(
            model_state, state, given, sums, inputs_valid, settings, power=power, polyak=polyak
        )
    from momo_hf.optim.kernels import triton_model

    weight = torch.empty_like(given.loss)
    before = [*model_state, *state]
    how = {"power": power, "polyak": polyak}
    new, (factor, decay, ok) = decide(
        triton_model.next_averaged_step, before, given, sums, inputs_valid, settings, weight, **how
    )
    fields = len(model_state)
    return ModelState(*new[:fields]), AverageState(*new[fields:]), AveragedStep(factor, decay, weight, ok)


def decide(
    kernel: Any,
    state: list[Tensor],
    given: Given,
    sums: Sums | AveragedSums,
    inputs_valid: Tensor,
    settings: Settings,
    *more: Tensor,
    **how: Any,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor, Tensor]]:
    """Launch a kernel that decides on a step: the new state, and `factor`, `decay` and `ok` of the step."""
    loss, fields, groups = given.loss, len(state), len(given.lr)
    new, factor, decay = loss.new_empty(fields + 2 * groups).split([fields, groups, groups])
    ok = torch.empty((), dtype=torch.bool, device=loss.device)
    launch.launch(
        kernel,
        1,
        *(torch.stack(state), loss, *sums, given.lr, given.weight_decay, inputs_valid),
        loss if given.clip_factor is None else given.clip_factor,
        *(new, factor, decay, ok, *more),
        settings.lb,
        groups,
        stride=sums[0].stride(0),
        clipped=given.clip_factor is not None,
        beta=settings.beta,
        bias_correction=settings.bias_correction,
        divide=settings.divide,
        block=block_of(groups),
        **how,
    )
    return new.unbind(), (factor, decay, ok)


def next_move(
    state: SearchState,
    loss: Tensor,
    slope: Tensor,
    norm: Tensor,
    sample: Tensor,
    *,
    lb: float,
    start: float | None,
    clip_factor: Tensor | None = None,
) -> tuple[SearchState, Move]:
    """`search.next_move`, with its arguments and results."""
    if not in_one_launch(loss):
        return search.next_move(state, loss, slope, norm, sample, lb=lb, start=start, clip_factor=clip_factor)
    from momo_hf.optim.kernels import triton_search

    scalars, vectors = [v for v in state if v.dim() == 0], [v for v in state if v.dim() > 0]
    new = loss.new_empty(len(scalars) + sum(map(len, vectors)))
    size = torch.empty_like(loss)
    ok, back, begins = torch.empty(3, dtype=torch.bool, device=loss.device).unbind()
    launch.launch(
        triton_search.next_move,
        1,
        *(torch.stack(scalars), *vectors, loss, slope, norm, sample),
        loss if clip_factor is None else clip_factor,
        *(new, size, ok, back, begins),
        lb,
        0.0 if start is None else start,
        clipped=clip_factor is not None,
        starts=start is not None,
    )
    found, *rows = new.split([len(scalars), *map(len, vectors)])
    return SearchState(*found.unbind(), *rows), Move(size, ok, back, begins)


def in_one_launch(like: Tensor) -> bool:
    """Whether the scalars are where Triton runs."""
    return like.dtype == torch.float32 and launch.runs_on(like.device)


def block_of(groups: int) -> int:
    """Vectors in Triton have a power of two of entries."""
    return 1 << (groups - 1).bit_length()
