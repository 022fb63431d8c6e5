"""How the two passes of a step are done: for any method (`plain`, `compiled`) or for one (`fused`, `multi_tensor`)."""

from momo_hf.optim.kernels.contract import Kernels
from momo_hf.optim.kernels.table import TABLE, assign, register


__all__ = ["TABLE", "Kernels", "assign", "register"]
