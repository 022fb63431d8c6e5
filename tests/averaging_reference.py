"""Schedule-free learning with a Polyak step, written out in float64 NumPy with all three sequences stored; a problem."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from momo_hf.optim import MomoAdam


@dataclass
class AveragingReference:
    """On one array per parameter; `groups` says which group each belongs to.

    Args:
        start: z_1 = x_1.
        groups: index of its group, for every parameter.
        lrs: α_g; may be changed between steps.
        decays: λ_g.
        beta2: of Adam's second moment, or None for the identity.
        tables: the parameters that are tables of embeddings.
    """

    start: list[np.ndarray]
    groups: list[int]
    lrs: list[float]
    decays: list[float]
    beta: float = 0.9
    interpolation: float = 0.7
    beta2: float | None = 0.999
    eps: float = 1e-8
    lb: float = 0.0
    divide: bool = True
    power: int = 3
    polyak: float = 1.0  # 2 after a search
    bound: float = 2.0
    tables: tuple[int, ...] = ()
    k: int = 0
    gap: float = 0.0
    q: float = 0.0
    largest: float = 0.0
    taus: list[float] = field(default_factory=list)

    def __post_init__(self):
        self.z = [p.copy() for p in self.start]
        self.x = [p.copy() for p in self.start]
        self.v = [np.zeros_like(p) for p in self.start]
        self.first = [None] * len(self.start)  # the step of the first gradient
        self.weights = []

    @property
    def y(self):
        return [(1 - self.interpolation) * z + self.interpolation * x for z, x in zip(self.z, self.x)]

    def step(self, loss, grads, kappa=1.0):
        """One update from the loss and the gradients at y; a parameter whose gradient is None stays."""
        self.k += 1
        alpha, y = max(self.lrs), self.y
        ratio = [lr / alpha if alpha > 0 else 1.0 for lr in self.lrs]
        a = [lr * wd for lr, wd in zip(self.lrs, self.decays)]
        value, slope = self.lb + kappa * (loss - self.lb), 0.0  # of the linear model at z, after the decay alone
        directions = []
        for i, (g, group) in enumerate(zip(grads, self.groups)):
            if g is None and self.first[i] is None:
                directions.append(None)
                continue
            if self.first[i] is None:
                self.first[i] = self.k
            g = np.zeros_like(self.z[i]) if g is None else g
            own = self.k - self.first[i] + 1
            u = g
            if self.beta2 is not None:
                self.v[i] = self.beta2 * self.v[i] + (1 - self.beta2) * g * g
                u = g / (np.sqrt(self.v[i] / (1 - self.beta2**own)) + self.eps)
            if i in self.tables:
                u = np.clip(u, -self.bound, self.bound)
            directions.append(u)
            at = self.z[i] / (1 + a[group]) if self.divide else self.z[i]
            value += np.sum(g * (at - y[i]))
            slope += ratio[group] * np.sum(g * u) / (1 + a[group] if self.divide else 1.0)
        self.gap = self.beta * self.gap + (1 - self.beta) * max(value - self.lb, 0.0)
        self.q = self.beta * self.q + (1 - self.beta) * slope
        tau = min(alpha, self.polyak * self.gap / self.q) if self.q > 0 else 0.0
        self.taus.append(tau)
        self.largest = max(self.largest, tau)
        self.weights.append(self.k**self.power * self.largest**2)
        for i, group in enumerate(self.groups):
            if grads[i] is None:
                continue
            if self.divide:
                self.z[i] = (self.z[i] - tau * ratio[group] * directions[i]) / (1 + a[group])
            else:
                self.z[i] = self.z[i] - tau * ratio[group] * directions[i] - a[group] * y[i]
            total = sum(self.weights)
            fraction = self.weights[-1] / total if total > 0 else 0.0
            if self.first[i] > 1:
                own = self.k - self.first[i] + 1
                fraction = max(fraction, own**self.power / sum(j**self.power for j in range(1, own + 1)))
            self.x[i] = self.x[i] + fraction * (self.z[i] - self.x[i])


SHAPES = [(20, 3), (7,), (), (4, 2, 5)]
GROUPS = [0, 0, 1, 1]


def problem(seed=0, dtype=torch.float64):
    """Parameters, and a noisy loss with gradients in NumPy, which is small and hard enough for both kinds of step."""
    generator = np.random.default_rng(seed)
    start = [np.asarray(generator.standard_normal(shape)) for shape in SHAPES]
    target = [np.asarray(generator.standard_normal(shape)) for shape in SHAPES]

    def at(points, step):
        noise = np.random.default_rng(1000 + step)
        errors = [p - t + 0.3 * noise.standard_normal(np.shape(t)) for p, t in zip(points, target)]
        return 0.05 + sum(np.sum(e * e) for e in errors) / 100, [e / 50 for e in errors]

    return start, [nn.Parameter(torch.tensor(p, dtype=dtype)) for p in start], at


def in_groups(params, lrs, decays):
    members = [[p for p, g in zip(params, GROUPS) if g == index] for index in range(len(lrs))]
    return [{"params": m, "lr": lr, "weight_decay": wd} for m, lr, wd in zip(members, lrs, decays)]


def z_of(optimizer, p):
    """z of a parameter in train mode."""
    entry = optimizer.state[p]
    return (entry.get("y", p.detach()) + entry["ahead"]).numpy()


def values(params):
    return [p.detach().numpy().copy() for p in params]


def close(found, expected, rtol=1e-10, atol=1e-12):
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(f, e, rtol=rtol, atol=atol)
    return True


def give(params, grads):
    for p, g in zip(params, grads):
        p.grad = None if g is None else torch.tensor(g, dtype=p.dtype)


def trained(dtype=torch.float32, steps=25, **options):
    _, params, at = problem(dtype=dtype)
    optimizer = MomoAdam(params, **{"lr": 0.3, "averaging": True, **options})
    more_steps(optimizer, params, at, range(steps))
    return optimizer, params, at


def more_steps(optimizer, params, at, steps):
    for step in steps:
        optimizer.train()
        loss, grads = at([p.detach().double().numpy() for p in params], step)
        give(params, grads)
        optimizer.step(loss=float(loss))
