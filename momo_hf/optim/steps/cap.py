"""What a cap that was found allows later: less during a warmup, near the bound of the loss, and for what is beside embeddings."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from momo_hf.optim.record import Group
from momo_hf.optim.steps.arithmetic import divided, minimum, or_else, root
from momo_hf.optim.steps.given import Settings
from momo_hf.optim.steps.model import ModelState
from momo_hf.optim.steps.search import WINDOW, SearchState


# The share of the first loss that has to be left for the whole cap to count.
LEFT_OF_LOSS = 0.1


def warmup(steps: Tensor, step: Tensor) -> Tensor:
    """The factor of the cap for step j of training, 0-dim: it rises to 1 in as many steps as the search took.

    Adam's moments are young again and the weights where training begins; a warmup as long as the search was worth 3 to
    10 % on transformers.

    Args:
        steps: of the search.
        step: j, counted from the end of the search.
    """
    return minimum(divided(step, steps), 1.0)


def whole_until(state: SearchState, lb: float) -> Tensor:
    """0.1 (f_0 - lb), the gap from which on the whole cap counts, 0-dim; 0 where f_0 lies below `lb`, which is no bound then.

    Args:
        state: after the search; f_0 is the mean of its first losses, when it had hardly moved, and no number where it did not
            come so far.
        lb: the lower bound of the loss.
    """
    return LEFT_OF_LOSS * (state.losses.narrow(0, 0, WINDOW).mean() - lb).clamp(min=0)


def fall(until: Tensor, model: ModelState, settings: Settings) -> Tensor:
    """The factor of the cap at the loss of now, 0-dim: 1, or where less than a tenth of the first loss is left

        √( (f̂ - lb) / (0.1 (f_0 - lb)) )

    The distance that is left to a minimum is in proportion to the root of the loss, as far as that is quadratic, and a step
    should not be longer. Adam's and Muon's steps do not shrink with the gradient. Polyak's shrinks where the loss is
    quadratic. But of a classifier that tells all its samples apart loss and gradient fall alike: without this, steps as long
    as ever make it only more certain, of its errors too.

    Args:
        until: see `whole_until`.
        model: counters and logs after the last step, f̂ among them; where that lies below `lb` the factor is 1.
        settings: the shared options.
    """
    # Not `debias`, whose digits nobody needs here, and which is one call more on a device.
    rho = 1 - settings.beta**model.step if settings.bias_correction else minimum(model.step, 1.0)
    gap = divided(model.raw_loss_avg, rho) - settings.lb
    # What is not known yet is no number, as 0 / 0, and the root of what lies below the bound is none either.
    return or_else(root(minimum(divided(gap, until), 1.0)), 1.0)


def shares(groups: list[Group], state: Mapping[Tensor, Any], others: float) -> list[float]:
    """What of a cap that was found counts for the `embeddings` of each group, and then for the other parameters of each,
    where iterates are averaged. A group without embeddings has the second number twice.

    Embeddings bear longer steps than the layers beside them, and a ramp in which all take the same steps sees what the
    whole model bears.

    Args:
        groups: the parameter groups.
        state: per parameter; embeddings without one have not learnt, as frozen ones.
        others: what counts beside embeddings that learn.

    Returns:
        Two numbers a group; none where all of the cap counts for all.
    """
    if others == 1 or not groups[0]["averaging"]:
        return []
    learn = [any(group["params"][place] in state for place in group.get("embeddings", ())) for group in groups]
    return [1.0 if own else others for own in learn] + [others] * len(groups) if any(learn) else []
