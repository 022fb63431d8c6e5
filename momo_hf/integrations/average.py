"""Averages over processes that are waited for as late as possible."""

import torch.distributed as dist
from torch import Tensor

from momo_hf.integrations.gradients import Groups


class Average:
    """The mean of some numbers over processes, started at once and waited for when it is needed.

    Args:
        values: this process's numbers, 1-dim; every process of the groups makes the same averages in the same order.
        groups: process groups to average over, one after the other; at least one.
    """

    def __init__(self, values: Tensor, groups: Groups) -> None:
        self._values, self._count = values.clone(), 1
        self._work: dist.Work | None = None
        for group in groups:
            if self._work is not None:
                self._work.wait()
            self._work = dist.all_reduce(self._values, group=group, async_op=True)
            self._count *= dist.get_world_size(group)

    def value(self, index: int) -> Tensor:
        """One of the means, 0-dim."""
        if self._work is not None:
            self._work.wait()
            self._values, self._work = self._values / self._count, None
        return self._values[index]
