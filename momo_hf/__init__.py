"""MoMo and MoMo-Adam for transformers, accelerate and diffusers.

Importing this package makes `TrainingArguments(optim="momo")`, `optim="momo_adam"` and `optim="momo_adam_auto"` valid,
and hands the loss of every `Accelerator.backward` to the MoMo optimizer that the Accelerator prepared.
"""

from momo_hf.integrations.accelerate import install, momo_metrics
from momo_hf.integrations.callback import MomoCallback
from momo_hf.integrations.smoothing import label_smoothing_bound
from momo_hf.integrations.transformers import (
    MomoSeq2SeqTrainer,
    MomoTrainer,
    MomoTrainerMixin,
    equip_trainers,
    momo_kwargs,
    register,
)
from momo_hf.optim import Momo, MomoAdam, MomoAdamAuto, MomoOptimizer


install()
register()
equip_trainers()

__all__ = [
    "Momo",
    "MomoAdam",
    "MomoAdamAuto",
    "MomoCallback",
    "MomoOptimizer",
    "MomoSeq2SeqTrainer",
    "MomoTrainer",
    "MomoTrainerMixin",
    "label_smoothing_bound",
    "momo_kwargs",
    "momo_metrics",
]
