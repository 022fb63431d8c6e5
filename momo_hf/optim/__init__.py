"""The optimizers; this package needs torch alone."""

from momo_hf.optim.base import MomoOptimizer
from momo_hf.optim.momo import Momo
from momo_hf.optim.momo_adam import MomoAdam


__all__ = ["Momo", "MomoAdam", "MomoOptimizer"]
