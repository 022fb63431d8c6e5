"""The optimizers; this package needs torch alone."""

from momo_hf.optim.method import Method
from momo_hf.optim.momo import Momo
from momo_hf.optim.momo_adam import MomoAdam
from momo_hf.optim.momo_muon import MomoMuon
from momo_hf.optim.optimizer import MomoOptimizer


__all__ = ["Method", "Momo", "MomoAdam", "MomoMuon", "MomoOptimizer"]
