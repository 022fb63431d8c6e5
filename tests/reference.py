"""The paper's update written out in float64 NumPy, with every inner product computed as it is defined.

Nothing is taken from the package: γ_k is an average of <g_j, x_j>, the minimiser of the truncated model comes from its
definition with one decay per group, and the momentum model is evaluated, not carried along.
"""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Reference:
    """MoMo (`betas=None`) or MoMo-Adam on lists of arrays, one list per parameter group.

    Args:
        params: one list of float64 arrays per group; changed in place by `step`.
        lrs: α_g; may be changed between steps.
        decays: λ_g.
        beta: β.
        beta2: β2 of Adam's second moment, or None for MoMo.
        bias_correction: whether the averages start at 0 and are corrected.
    """

    params: list[list[np.ndarray]]
    lrs: list[float]
    decays: list[float]
    beta: float = 0.9
    beta2: float | None = None
    eps: float = 1e-8
    lb: float = 0.0
    bias_correction: bool = False
    use_fstar: bool = False
    divide: bool = True
    k: int = 0
    f_bar: float = 0.0
    gamma: float = 0.0
    fstar: float = field(init=False)
    tau: float = 0.0
    rho: float = 1.0

    def __post_init__(self):
        self.fstar = self.lb
        self.d = [[np.zeros_like(x) for x in group] for group in self.params]
        self.v = [[np.zeros_like(x) for x in group] for group in self.params]

    def step(self, loss, grads, kappa=1.0):
        """One update; a gradient that is None counts as zero for the averages, and its parameter stays."""
        self.k += 1
        beta = self.beta
        loss = self.fstar + kappa * (loss - self.fstar)
        if self.k == 1 and not self.bias_correction:
            weight = 1.0
        else:
            weight = 1 - beta
        self.rho = rho = 1 - beta**self.k if self.bias_correction else 1.0
        self.f_bar = (1 - weight) * self.f_bar + weight * loss
        gx = 0.0
        for i, group in enumerate(self.params):
            for j, x in enumerate(group):
                g = np.zeros_like(x) if grads[i][j] is None else grads[i][j]
                gx += np.sum(g * x)
                self.d[i][j] = (1 - weight) * self.d[i][j] + weight * g
                if self.beta2 is not None:
                    self.v[i][j] = self.beta2 * self.v[i][j] + (1 - self.beta2) * g * g
        self.gamma = (1 - weight) * self.gamma + weight * gx
        dx = sum(np.sum(d * x) for dg, xg in zip(self.d, self.params) for d, x in zip(dg, xg))
        h = self.f_bar + dx - self.gamma  # the averaged model at x_k

        moving = [[g is not None for g in group] for group in grads]
        directions = [[self._direction(i, j) for j in range(len(group))] for i, group in enumerate(self.params)]
        alpha = max(self.lrs)
        r = [lr / alpha if alpha > 0 else 0.0 for lr in self.lrs]
        a = [lr * wd for lr, wd in zip(self.lrs, self.decays)]

        def sums(weights):
            total_n = total_s = 0.0
            for i, group in enumerate(self.params):
                for j, x in enumerate(group):
                    if moving[i][j]:
                        total_n += weights[i][0] * np.sum(self.d[i][j] * directions[i][j])
                        total_s += weights[i][1] * np.sum(self.d[i][j] * x)
            return total_n, total_s

        slope, shift = sums([(r[i] / (1 + a[i]), a[i] / (1 + a[i])) for i in range(len(a))])
        n, _ = sums([(r[i], 0.0) for i in range(len(a))])
        value = h - shift
        if self.use_fstar and value < rho * self.fstar:
            self.fstar = max(value / (2 * rho), self.lb)
        polyak = max(value - rho * self.fstar, 0.0) / slope if slope > 0 else 0.0
        tau = min(alpha / rho, polyak)
        if self.use_fstar:
            self.fstar = max((h - 0.5 * tau * n) / rho, self.lb)
        for i, group in enumerate(self.params):
            for j, x in enumerate(group):
                if not moving[i][j]:
                    continue
                if self.divide:
                    group[j] = (x - tau * r[i] * directions[i][j]) / (1 + a[i])
                else:
                    group[j] = (1 - a[i]) * x - tau * r[i] * directions[i][j]
        self.tau = tau

    def _direction(self, i, j):
        if self.beta2 is None:
            return self.d[i][j]
        return self.d[i][j] / (np.sqrt(self.v[i][j] / (1 - self.beta2**self.k)) + self.eps)
