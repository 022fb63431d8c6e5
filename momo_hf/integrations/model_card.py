"""How a generated model card names a MoMo optimizer."""

import inspect
from collections.abc import Callable
from typing import Any

from transformers import Trainer

from momo_hf.integrations.groups import methods_in_words
from momo_hf.integrations.learning_rate import cap_of
from momo_hf.integrations.weights import unwrap_optimizer
from momo_hf.optim import Momo, MomoAdam, MomoMuon, MomoOptimizer


NAMES = {Momo: "MoMo", MomoAdam: "MoMo-Adam", MomoMuon: "MoMo-Muon"}
# Arguments that are said otherwise, or change how a step is computed and not what it is.
NOT_LISTED = ("params", "lr", "foreach", "compile")


def extract_hyperparameters(original: Callable) -> Callable:
    """Wrap transformers' function of almost this name, which knows the argument `optim` only."""

    def extract_hyperparameters_from_trainer(trainer: Trainer) -> dict[str, Any]:
        hyperparameters = original(trainer)
        optimizer = unwrap_optimizer(trainer.optimizer)
        if optimizer is not None:
            hyperparameters["optimizer"] = describe(optimizer)
            hyperparameters["learning_rate"] = cap_of(optimizer) or "auto"
        return hyperparameters

    return extract_hyperparameters_from_trainer


def describe(optimizer: MomoOptimizer) -> str:
    """Name an optimizer and its arguments in a sentence.

    Args:
        optimizer: the MoMo optimizer itself, without wrappers.
    """
    cls, group = type(optimizer), optimizer.param_groups[0]
    names = [name for name in inspect.signature(cls).parameters if name in group and name not in NOT_LISTED]
    options = ", ".join(f"{name}={group[name]}" for name in names)
    cap, search = cap_of(optimizer), optimizer.search
    sizes = "step sizes that grow, in search of their bound" if cap is None else f"step sizes up to {cap:g}"
    found = f", found by a search in the first {search.steps} steps" if search is not None and cap is not None else ""
    if methods := methods_in_words(optimizer):
        options = f"{methods}, {options}"
    return f"{NAMES.get(cls, cls.__name__)} (momo_hf) with {sizes}{found}, {options}"
