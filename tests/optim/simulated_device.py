"""A device that is not there: fake tensors on "cuda", and a counter of what a step does to them.

It counts operator calls, the bytes of every tensor that they read or write, the memory that they hold, and what a CUDA
graph could not capture: copies from the host, and values that are read back. Kernels in Triton are stand-ins, which count
as one call and leave their bytes to `test_triton`, where the kernels are run.
"""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from momo_hf.optim import kernels
from momo_hf.optim.kernels import launch
from scripts.counted import Counted


PASSES = ("first_pass", "second_pass")
KERNELS = {
    **dict.fromkeys(("triton_passes", "triton_averaged", "triton_ramp"), PASSES),
    "triton_muon": ("sizes", "norms", "scaled"),
    "triton_model": ("begin", "next_step", "next_averaged_step"),
    "triton_search": ("next_move",),
}


class Kernel:
    """Stands for a kernel in Triton."""

    def __init__(self, counters: list[Counted]) -> None:
        self.counters = counters

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, **constants):
        assert all(not a.is_cpu for a in arguments if isinstance(a, Tensor))
        for counted in self.counters:
            counted.launched()


class Device:
    """The simulated device; made by the fixture `device`."""

    def __init__(self) -> None:
        self.counters: list[Counted] = []

    @contextmanager
    def counted(self):
        with Counted() as counted:
            self.counters.append(counted)
            yield counted
            self.counters.remove(counted)

    @staticmethod
    def parameters(shapes, dtype=torch.float32) -> list[nn.Parameter]:
        made = [nn.Parameter(torch.empty(shape, device="cuda", dtype=dtype)) for shape in shapes]
        for p in made:
            p.grad = torch.empty_like(p)
        return made


@pytest.fixture
def device(monkeypatch):
    """A simulated CUDA device with Triton."""
    simulated = Device()
    kernel = Kernel(simulated.counters)
    for name, names in KERNELS.items():
        monkeypatch.setattr(kernels, name, SimpleNamespace(**dict.fromkeys(names, kernel)), raising=False)
    monkeypatch.setattr(kernels, "triton_tensors", SimpleNamespace(BLOCK=2048), raising=False)
    monkeypatch.setattr("momo_hf.optim.kernels.multi_tensor.triton_dtype", lambda dtype: dtype)
    monkeypatch.setattr(launch, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    # A tensor without memory has no address; these stay where they are.
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda tensor: 16 * tensor.untyped_storage()._cdata, raising=False)
    with FakeTensorMode(allow_non_fake_inputs=True):  # imports what makes classes of torch.Event
        # What a search sends to the host is on its way for as long as it likes.
        monkeypatch.setattr(torch, "Event", lambda *given: SimpleNamespace(record=lambda *given: None))
        monkeypatch.setattr(torch.accelerator, "current_stream", lambda *given: None)
        yield simulated
