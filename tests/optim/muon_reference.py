"""MoMo on Muon written out in float64 NumPy: the model along the momentum, and the averaged step; and a problem with matrices."""

import numpy as np
import torch
from torch import nn


def five_steps(matrix):
    """Newton-Schulz on a 2-dim array, with Jordan's coefficients."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    norm = np.linalg.norm(x)
    x = x / norm if norm > 0 else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def muon(d):
    matrix = d.reshape(len(d), -1)
    return (0.2 * np.sqrt(max(matrix.shape)) * five_steps(matrix)).reshape(d.shape)


class MuonReference:
    """On one array per parameter.

    Args:
        start: x_0.
        methods: "muon" or "adam", for every parameter.
        lrs: α, for every parameter; may be changed between steps.
        decays: λ, likewise.
        averaging: β of y, or None.
    """

    def __init__(self, start, methods, lrs, decays, lb=0.0, divide=True, averaging=None, betas=(0.9, 0.999)):
        self.methods, self.lrs, self.decays = methods, list(lrs), decays
        self.lb, self.divide, self.interpolation, self.betas = lb, divide, averaging, betas
        self.z = [p.copy() for p in start]
        self.x = [p.copy() for p in start]
        self.d = [np.zeros_like(p) for p in start]
        self.v = [np.zeros_like(p) for p in start]
        self.k, self.f, self.gamma, self.gap, self.norm, self.largest, self.weights = 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        self.tau = 0.0

    @property
    def at(self):
        """Where loss and gradients are taken."""
        if self.interpolation is None:
            return [p.copy() for p in self.x]
        return [(1 - self.interpolation) * z + self.interpolation * x for z, x in zip(self.z, self.x)]

    def step(self, loss, grads, kappa=1.0):
        if not np.isfinite(loss) or not all(np.isfinite(g).all() for g in grads):
            return
        at, (beta, beta2) = self.at, self.betas
        self.k += 1
        rho = 1 - beta**self.k
        self.d = [beta * d + (1 - beta) * g for d, g in zip(self.d, grads)]
        self.v = [beta2 * v + (1 - beta2) * g * g for v, g in zip(self.v, grads)]
        alpha = max(self.lrs)
        r = [lr / alpha for lr in self.lrs]
        a = [lr * decay for lr, decay in zip(self.lrs, self.decays)]
        shrink = [1 / (1 + value) if self.divide else 1.0 for value in a]
        hats, u = [], []
        for d, g, v, method in zip(self.d, grads, self.v, self.methods):
            hat = d / rho if self.interpolation is None or method == "muon" else g
            hats.append(hat)
            u.append(muon(hat) if method == "muon" else hat / (np.sqrt(v / (1 - beta2**self.k)) + 1e-8))
        fed = self.lb + kappa * (loss - self.lb)
        if self.interpolation is None:
            self.f = beta * self.f + (1 - beta) * fed
            self.gamma = beta * self.gamma + (1 - beta) * sum(np.sum(g * x) for g, x in zip(grads, at))
            # The paper takes the model with the proximal decay in both forms.
            inner = [1 / (1 + value) for value in a]
            height = (self.f - self.gamma) / rho + sum(s * np.sum(h * x) for s, h, x in zip(inner, hats, at))
            slope = sum(q * s * np.sum(h * w) for q, s, h, w in zip(r, inner, hats, u))
            self.tau = min(alpha, max(height - self.lb, 0.0) / slope)
            for i, x in enumerate(self.x):
                moved = (x if self.divide else (1 - a[i]) * x) - self.tau * r[i] * u[i]
                self.x[i] = moved * (shrink[i] if self.divide else 1.0)
            return
        gap = fed - self.lb + sum(np.sum(g * (s * z - y)) for g, s, z, y in zip(grads, shrink, self.z, at))
        self.gap = beta * self.gap + (1 - beta) * max(gap, 0.0)
        slope = sum(q * s * np.sum(g * w) for q, s, g, w in zip(r, shrink, grads, u))
        self.norm = beta * self.norm + (1 - beta) * slope
        self.tau = min(alpha, self.gap / self.norm) if self.norm > 0 else 0.0
        self.largest = max(self.largest, self.tau)
        weight = self.k * self.largest**2
        self.weights += weight
        c = weight / self.weights if self.weights else 0.0
        for i, z in enumerate(self.z):
            step = z - self.tau * r[i] * u[i]
            self.z[i] = step * shrink[i] if self.divide else step - a[i] * at[i]
            self.x[i] = self.x[i] + c * (self.z[i] - self.x[i])


SHAPES = [(6, 4), (4, 6), (6, 4), (5, 2, 3, 2), (1, 7), (4,), ()]
METHODS = ["muon", "muon", "muon", "muon", "muon", "adam", "adam"]


def problem(seed=0, dtype=torch.float64):
    """Parameters, and a noisy loss with its gradients in NumPy."""
    generator = np.random.default_rng(seed)
    start = [np.asarray(generator.standard_normal(shape)) for shape in SHAPES]
    target = [np.asarray(generator.standard_normal(shape)) for shape in SHAPES]

    def at(points, step):
        noise = np.random.default_rng(1000 + step)
        errors = [p - t + 0.3 * noise.standard_normal(np.shape(t)) for p, t in zip(points, target)]
        return 0.05 + sum(np.sum(e * e) for e in errors) / 100, [np.asarray(e / 50) for e in errors]

    return start, [nn.Parameter(torch.tensor(p, dtype=dtype)) for p in start], at


def in_groups(params, lrs=(0.1, 0.1), decays=(0.0, 0.0)):
    """A group for each method."""
    matrices, others = params[:5], params[5:]
    return [
        {"params": matrices, "method": "muon", "lr": lrs[0], "weight_decay": decays[0]},
        {"params": others, "lr": lrs[1], "weight_decay": decays[1]},
    ]
