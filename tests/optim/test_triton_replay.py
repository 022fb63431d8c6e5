"""A step as a CUDA graph would replay it: the same operators on the same tensors, without a look at the Python around them.

There is no GPU, so a recording stands for the graph. It takes down every operator and every launch of one step, and a replay
does them again where they were, in Triton's interpreter. What a step leaves behind in a new tensor is then lost, and what
it took from Python is that of the recorded step; both would make the replays differ from real steps.
"""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from momo_hf.optim import Momo, MomoAdam, MomoMuon
from momo_hf.optim.kernels import launch, table
from momo_hf.optim.kernels.fused import Fused
from scripts.counted import tensors_in


pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy computes what a device leaves out


class Recording(TorchDispatchMode):
    """The operators and launches of the code under it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, made))
        return made

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, made in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(made), tree_leaves(again)):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def record(monkeypatch):
    """Record a step on a device with Triton."""
    from momo_hf.optim.kernels import triton_tensors

    monkeypatch.setattr(triton_tensors, "BLOCK", 64)
    monkeypatch.setattr(launch, "runs_on", lambda device: True)
    left = [entry for entry in table.TABLE if not issubclass(entry.kernels, Fused)]  # which is for a CPU
    monkeypatch.setattr(table, "TABLE", left)
    recording, real = Recording(), launch.launch

    def launched(*args, **constants):
        with _disable_current_modes():  # the interpreter itself works with tensors
            real(*args, **constants)
        recording.calls.append((real, args, constants, None))

    def run(step):
        with monkeypatch.context() as patch, recording:
            patch.setattr(launch, "launch", launched)
            step()
        return recording

    return run


class Training:
    """An optimizer with static places for what a step is given: gradients, loss, clip factor and learning rates."""

    def __init__(self, cls, dtype, **options) -> None:
        generator = torch.Generator().manual_seed(1)
        self.params = [
            nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in [(7, 9), (130,), (4, 4), ()]
        ]
        for p in self.params:
            p.grad = torch.zeros_like(p)
        groups = [{"params": self.params[:2], "weight_decay": 0.1}, {"params": self.params[2:]}]
        if cls is MomoMuon:
            groups = [
                {"params": self.params[::2], "weight_decay": 0.1, "method": "muon"},
                {"params": self.params[1::2]},
            ]
        self.optimizer = cls(groups, **options)
        self.loss, self.clip_factor, *self.lrs = (torch.ones(()) for _ in range(4))
        for group, lr in zip(self.optimizer.param_groups, self.lrs):
            group["lr"] = lr

    def fill(self, step: int) -> None:
        """Put in what a step is given; in the fourth one a gradient is not finite."""
        generator = torch.Generator().manual_seed(step)
        for p in self.params:
            p.grad.copy_(torch.randn(p.shape, generator=generator))
        if step == 4:
            self.params[0].grad[0, 0] = torch.nan
        self.loss.fill_(3.0 - 0.2 * step)
        self.clip_factor.fill_(1 / (1 + step))
        for i, lr in enumerate(self.lrs):
            lr.fill_(0.01 * (i + 1) / step)

    def step(self) -> None:
        self.optimizer.set_clip_factor(self.clip_factor)
        self.optimizer.step(loss=self.loss)

    def everything(self) -> list[torch.Tensor]:
        state = self.optimizer.state_dict()
        return self.params + tensors_in((state["state"], state["param_groups"]))


@pytest.mark.parametrize(
    "cls, options",
    [
        (Momo, {}),
        (MomoAdam, {}),
        (MomoAdam, {"use_fstar": True, "divide": False}),
        (Momo, {"averaging": True}),
        (MomoAdam, {"averaging": True}),
        (MomoAdam, {"averaging": 0.5, "divide": False}),
        (MomoMuon, {}),
        (MomoMuon, {"averaging": True}),
    ],
    ids=[
        "Momo",
        "MomoAdam",
        "options",
        "Momo, averaging",
        "averaging",
        "averaging, options",
        "Muon",
        "Muon, averaging",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_replays_of_a_step_are_the_steps(record, cls, options, dtype):
    ours, expected = Training(cls, dtype, **options), Training(cls, dtype, **options)
    for training in (ours, expected):
        training.fill(1)
        training.step()
    for training in (ours, expected):
        training.fill(2)
    recording = record(ours.step)
    launches = [call for call in recording.calls if call[0] is launch.launch]
    # Two for the scalars. Of the passes two where no tensor is aligned, and four where one is and one is not.
    muon = cls is MomoMuon  # a matrix is aligned and one is not, and so it is with X_0; no other is
    assert len(launches) == 2 + (4 + 5 + 2 if muon else 2 + 4)
    expected.step()
    for step in range(3, 7):
        for training in (ours, expected):
            training.fill(step)
        recording.replay()
        expected.step()
        torch.testing.assert_close(ours.everything(), expected.everything(), rtol=0, atol=0, equal_nan=True)
    assert ours.optimizer.param_groups[0]["skipped"] == 1 and ours.optimizer.param_groups[1]["step"] == 5
