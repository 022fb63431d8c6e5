"""What the README shows must work as it stands."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn


README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(heading, language="python"):
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def test_write_your_own_is_a_complete_method():
    (code,) = blocks("Write your own")
    assert len(code.strip().splitlines()) <= 25
    namespace = {}
    exec(code, namespace)
    # The method by its definition in float64, with the explicit inner products of the averaged model.
    rng = np.random.default_rng(0)
    matrix, target = rng.normal(size=(8, 4)), rng.normal(size=8)
    x = rng.normal(size=4)
    p = nn.Parameter(torch.tensor(x))
    optimizer = namespace["MomoRMSprop"]([p], lr=0.5, weight_decay=0.1)
    a, d, v, f_bar, gamma = 0.5 * 0.1, 0.0, 0.0, 0.0, 0.0
    for step in range(50):
        residual = matrix @ x - target
        f, g = residual @ residual / 16, matrix.T @ residual / 8
        weight = 1.0 if step == 0 else 0.1
        d, f_bar = (1 - weight) * d + weight * g, (1 - weight) * f_bar + weight * f
        gamma, v = (1 - weight) * gamma + weight * (g @ x), 0.99 * v + 0.01 * g * g
        u = d / (np.sqrt(v) + 1e-8)
        tau = min(0.5, max((1 + a) * (f_bar - gamma) + d @ x, 0) / (d @ u))
        p.grad = torch.tensor(g)
        optimizer.step(loss=f)
        x = (x - tau * u) / (1 + a)
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("command", re.findall(r"python (scripts/\S+) (configs/\S+\.yaml)", README))
def test_commands_name_files_that_exist(command):
    assert all((Path(__file__).parents[1] / part).is_file() for part in command)


def test_links_into_the_repository_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
