"""Memory that the steps of a thread use again."""

import threading
from weakref import WeakSet

import torch
from torch import Tensor

from momo_hf.optim.kernels.contract import Kernels


# The elements of u, 128 MiB in all, that the first pass keeps for the second on a CPU: they are read again in half the time
# that the root and the division of Adam take.
KEPT = 1 << 25


class Memory(threading.local):
    """Memory of a thread, in float32, that every step uses again: the system takes longer to give so much and to take it
    back than the computing takes.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget it all."""
        self._rooms: dict[str, Tensor] = {}
        self._used = 0
        self._users: WeakSet[Kernels] = WeakSet()

    def keep(self, user: Kernels, size: int) -> Tensor:
        """Room that is the user's for as long as it lives; less than `size` where that is too much."""
        begin = self._used if self._users else 0
        self._used = end = min(begin + size, KEPT)
        self._users.add(user)
        return self.room("kept", end)[begin:end]

    def room(self, name: str, size: int) -> Tensor:
        """Room until the next call with this name; with zeros in it, or with what somebody left there."""
        held = self._rooms.get(name)
        if held is None or held.numel() < size:
            held = self._rooms[name] = torch.zeros(size, dtype=torch.float32, device="cpu")
        return held[:size]
