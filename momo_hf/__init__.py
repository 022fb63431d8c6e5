"""MoMo, MoMo-Adam and MoMo on Muon for transformers, accelerate, diffusers and plain PyTorch.

Importing this package registers the names `momo`, `momo_adam`, `momo_adam_auto`, `momo_muon` and `momo_muon_auto` for
`TrainingArguments(optim=...)`, and passes the loss of every `Accelerator.backward` to the MoMo optimizer that the Accelerator
prepared. It does not matter whether transformers and accelerate are imported before or after, or at all: importing this package
alone takes as long as importing torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from momo_hf import integrations
from momo_hf.optim import Method, Momo, MomoAdam, MomoMuon, MomoOptimizer


if TYPE_CHECKING:
    from momo_hf.integrations.accelerate import momo_metrics
    from momo_hf.integrations.callback import MomoCallback
    from momo_hf.integrations.groups import muon_groups
    from momo_hf.integrations.seq2seq import MomoSeq2SeqTrainer
    from momo_hf.integrations.smoothing import label_smoothing_bound
    from momo_hf.integrations.tables import mark_tables
    from momo_hf.integrations.transformers import MomoTrainer, MomoTrainerMixin, momo_kwargs

__version__ = "0.2.0.dev0"

__all__ = [
    "Method",
    "Momo",
    "MomoAdam",
    "MomoCallback",
    "MomoMuon",
    "MomoOptimizer",
    "MomoSeq2SeqTrainer",
    "MomoTrainer",
    "MomoTrainerMixin",
    "label_smoothing_bound",
    "mark_tables",
    "momo_kwargs",
    "momo_metrics",
    "muon_groups",
]

integrations.install()


def __getattr__(name: str) -> Any:
    """What needs transformers or accelerate is imported when it is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    elsewhere = {
        "MomoCallback": "callback",
        "MomoSeq2SeqTrainer": "seq2seq",
        "label_smoothing_bound": "smoothing",
        "mark_tables": "tables",
        "momo_metrics": "accelerate",
        "muon_groups": "groups",
    }
    module = elsewhere.get(name, "transformers")
    return getattr(importlib.import_module(f"momo_hf.integrations.{module}"), name)
