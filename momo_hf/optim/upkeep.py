"""What may be done to an optimizer from outside between two steps, and what it then is.

State is one thing: the scalars in the groups belong to the buffers. Who empties `optimizer.state` has a new optimizer, as with
torch's. Where the state of some parameters alone is gone, those join the model of the others anew (see `init_state`). And
parameters that have another dtype, as after `model.float()`, go on as if a new optimizer had loaded the state.
"""

from collections.abc import MutableMapping

import torch
from torch import Tensor

from momo_hf.optim.record import Group, params_of
from momo_hf.optim.state import widen
from momo_hf.optim.steps.averaged import AVERAGES, Form
from momo_hf.optim.steps.modelled import MODEL
from momo_hf.optim.steps.ramp import SEARCH
from momo_hf.optim.steps.search import new_search


def drop_empty(state: MutableMapping[Tensor, dict[str, Tensor]]) -> bool:
    """Take out what has no entries, as what was only asked for in torch's `defaultdict`.

    Returns:
        Whether anything is left.
    """
    for p in [p for p, entry in state.items() if not entry]:
        del state[p]
    return bool(state)


def reset(groups: list[Group], form: Form) -> None:
    """Give all groups the scalars of a new optimizer. Those that were there may stand in a state that was saved.

    Args:
        groups: the parameter groups.
        form: of the average, where nobody says otherwise.
    """
    head = groups[0]
    zeros = {name: torch.zeros_like(head[name]) for name in (*MODEL.keys, *AVERAGES.keys) if name in head}
    zeros["fstar"] = torch.full_like(head["fstar"], head["lb"])
    if SEARCH.stands_in(head):
        zeros |= zip(SEARCH.keys, new_search(head["search_steps"]))
    for group in groups:
        group.update(zeros | {"effective_lr": torch.zeros_like(group["effective_lr"])})
        if "lr_max" in group:
            group.update(form.kept() | {"lr_max": 0.0})


def dtypes_of(groups: list[Group]) -> list[torch.dtype]:
    """The dtypes of all parameters."""
    return [p.dtype for p in params_of(groups)]


def recast(groups: list[Group], state: MutableMapping[Tensor, dict[str, Tensor]]) -> None:
    """Give scalars and buffers the dtypes that loading gives them."""
    widen(groups)
    for p, entry in state.items():
        dtype = torch.promote_types(p.dtype, torch.float32)
        entry.update({name: value.to(dtype) for name, value in entry.items() if name != "start"})
