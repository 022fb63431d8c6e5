"""Whether a device runs kernels in Triton, and how one is started there."""

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def runs_on(device: torch.device) -> bool:
    """Whether Triton is there and makes code for the device."""
    return device.type == "cuda" and has_triton()


def launch(kernel: Any, programs: int, *arguments: Tensor | float, **constants: Any) -> None:
    """Run a kernel on the device of its first argument; Triton itself would take the current one.

    Args:
        kernel: a `triton.jit` function.
        programs: how many of it, at least one.
        arguments: in the order of the kernel's.
        constants: arguments that the code is made for.
    """
    with torch.cuda.device_of(arguments[0]):
        kernel[(programs,)](*arguments, **constants)
