"""`optim="momo"` and the like as names that transformers knows."""

from typing import Any

from transformers.training_args import OptimizerNames

from momo_hf.optim import Momo, MomoAdam, MomoMuon, MomoOptimizer


# What a name makes: a class, and options that the arguments go on top of.
METHODS: dict[str, tuple[type[MomoOptimizer], dict[str, Any]]] = {
    "momo": (Momo, {}),
    "momo_adam": (MomoAdam, {}),
    "momo_adam_auto": (MomoAdam, {"lr": "auto", "averaging": True}),
    "momo_muon": (MomoMuon, {}),
    "momo_muon_auto": (MomoMuon, {"lr": "auto", "averaging": True}),
}

# What a MomoTrainer takes where nothing was chosen: by the evidence in configs/sweeps the best of those without a learning rate
# to choose.
BEST = "momo_muon_auto"


def install() -> None:
    """Make the names valid wherever transformers takes the name of an optimizer; once.

    transformers has no public registry: a name is a member of the enum `OptimizerNames`.
    """
    for value in METHODS:
        if value in OptimizerNames._value2member_map_:
            continue
        member = str.__new__(OptimizerNames, value)
        member._name_, member._value_ = value.upper(), value
        OptimizerNames._member_names_.append(member._name_)
        OptimizerNames._member_map_[member._name_] = member
        OptimizerNames._value2member_map_[value] = member
