"""Small models and data for tests of training loops, deterministic in float64 or float32."""

import torch
from torch import nn
from torch.utils.data import Dataset


class Points(Dataset):
    """`rows` points of a noisy linear problem, some with fewer targets (label -100 means none)."""

    def __init__(self, rows=24, features=5, ragged=False, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(rows, features, generator=generator, dtype=torch.float64).to(dtype)
        weight = torch.randn(features, 3, generator=generator, dtype=torch.float64).to(dtype)
        self.labels = self.inputs @ weight + 0.1 * torch.randn(rows, 3, generator=generator, dtype=torch.float64).to(
            dtype
        )
        if ragged:
            for row in range(0, rows, 3):
                self.labels[row, 1:] = -100

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return {"inputs": self.inputs[index], "labels": self.labels[index]}


class Net(nn.Module):
    """Two layers; the loss is the mean over all targets that are there."""

    def __init__(self, features=5, width=7, dtype=torch.float32, seed=1):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(features, width, dtype=dtype)
        self.second = nn.Linear(width, 3, dtype=dtype)

    def errors(self, inputs, labels):
        outputs = self.second(torch.tanh(self.first(inputs)))
        there = labels != -100
        return (outputs - labels).square()[there]

    def forward(self, inputs, labels):
        return {"loss": self.errors(inputs, labels).mean()}


class TokenNet(Net):
    """The same, normalised by the number of targets in the whole global batch, as language models do."""

    def forward(self, inputs, labels, num_items_in_batch=None, **kwargs):
        errors = self.errors(inputs, labels)
        return {"loss": errors.sum() / (len(errors) if num_items_in_batch is None else num_items_in_batch)}
