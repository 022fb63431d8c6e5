"""A search for the cap and the averaging after it in float64 NumPy, with what happens to an optimizer in between."""

from dataclasses import dataclass, field

import numpy as np

from tests.averaging_reference import AveragingReference
from tests.optim.ramp_reference import fall, verdict


@dataclass
class History:
    """An optimizer with `averaging`, on one array per parameter; they hold y in training.

    Args:
        start: the parameters.
        groups: index of its group, for every parameter.
        decays: λ_g.
        auto: whether the cap is searched for; otherwise `step` is given the caps.
        corrected: whether the momentum of the ramp starts at 0 and is corrected.
        beta2: of Adam's second moment, or None for the identity.
    """

    start: list[np.ndarray]
    groups: list[int]
    decays: list[float]
    auto: bool
    corrected: bool
    beta2: float | None
    interpolation: float = 0.7
    lb: float = 0.0
    divide: bool = True
    beta: float = 0.9
    skipped: int = 0
    cap: float = np.inf
    tau: float = 0.0
    rows: list[tuple] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def __post_init__(self):
        self.begin([np.array(p) for p in self.start])

    def begin(self, points):
        """A new optimizer on these parameters."""
        self.points, self.searching, self.known = points, self.auto, [False] * len(points)
        self.rows, self.losses, self.dropped, self.first_size, self.skipped = [], [], 0, None, 0
        self.d = [np.zeros_like(p) for p in points]
        self.v = [np.zeros_like(p) for p in points]
        self.u = [np.zeros_like(p) for p in points]
        self.origins = [np.array(p) for p in points]
        if not self.auto:
            self._begin_average()

    def _begin_average(self):
        lrs = [0.0] * len(self.decays)
        options = {
            "interpolation": self.interpolation,
            "beta2": self.beta2,
            "lb": self.lb,
            "divide": self.divide,
            "beta": self.beta,
            "polyak": 2.0 if self.auto else 1.0,
        }
        self.average = AveragingReference(self.points, self.groups, lrs, self.decays, **options)
        self.average.first = [1 if known else None for known in self.known]

    @property
    def y(self):
        """What the parameters hold in train mode."""
        return self.points if self.searching else self.average.y

    @property
    def x(self):
        """What they hold in eval mode."""
        return self.points if self.searching else self.average.x

    def shift(self, index, by):
        """Something else adds to a parameter."""
        if self.searching:
            self.points[index] = self.points[index] + by
        else:
            self.average.z[index] = self.average.z[index] + by
            self.average.x[index] = self.average.x[index] + by

    def forget(self, index):
        """The state of a parameter is gone."""
        if not any(known for i, known in enumerate(self.known) if i != index):
            return self.begin(self.y)
        value, self.known[index] = self.y[index], False
        if self.searching:
            self.d[index], self.v[index], self.u[index] = (np.zeros_like(value) for _ in range(3))
        else:
            average = self.average
            average.z[index], average.x[index] = value.copy(), value.copy()
            average.v[index], average.first[index] = np.zeros_like(value), None

    def step(self, loss, grads, kappa=1.0, lrs=None):
        """One step, from gradients that were scaled by kappa; None for those that are not there."""
        for i, g in enumerate(grads):
            if g is not None and not self.known[i]:
                self.known[i] = True
                if self.searching:
                    self.origins[i] = self.points[i].copy()
                else:
                    self.average.first[i] = self.average.k + 1
        numbers = [loss, kappa, *(np.sum(g) for g in grads if g is not None)]
        usable = bool(np.isfinite(numbers).all()) and kappa >= 0
        kappa = min(kappa, 1.0)
        self.skipped += not usable
        if self.searching:
            self._ramp(loss, grads, kappa, usable and kappa > 0)
        elif usable:
            if self.auto:
                first = [row[0] - self.lb for row in self.rows]
                gaps = [f - self.lb for f in self.losses]
                factor = fall(first, gaps, self.beta, self.corrected)
                lrs = [self.cap * min((len(gaps) + 1) / len(self.rows), 1.0) * factor] * len(self.decays)
                self.losses.append(loss)
            self.average.lrs = lrs
            self.average.step(loss, grads, kappa)
            self.tau = self.average.taus[-1]

    def _ramp(self, loss, grads, kappa, usable):
        if not usable:
            self.dropped += 1 if np.isfinite(loss) else 10
            if self.dropped >= 20 and self.rows:
                self._end(self._cautious())
            return
        self.dropped, k = 0, len(self.rows) + 1
        rho = 1 - self.beta**k if self.corrected else 1.0
        slope = norm = sample = 0.0
        for i, known in enumerate(self.known):
            if not known:
                continue
            g = np.zeros_like(self.points[i]) if grads[i] is None else grads[i]
            slope += np.sum(g * self.u[i])
            weight = 1 - self.beta if self.corrected or k > 1 else 1.0
            self.d[i] = (1 - weight) * self.d[i] + weight * g
            D = np.ones_like(g)
            if self.beta2 is not None:
                self.v[i] = self.beta2 * self.v[i] + (1 - self.beta2) * g * g
                D = np.sqrt(self.v[i] / (1 - self.beta2**k)) + 1e-8
            self.u[i] = self.d[i] / rho / D
            norm += np.sum(self.d[i] / rho * self.u[i])
            sample += np.sum(g * g / D) / kappa
        self.rows.append((loss, slope, norm, sample))
        if k == 1:
            gap = kappa * (loss - self.lb)
            self.first_size = 1e-6 if self.beta2 is not None else 1e-4 * gap / norm
        reason, cap = verdict(self.rows, self.first_size)
        if reason:
            return self._end(cap)
        self.tau = self.first_size * 2 ** ((k - 1) / 3)
        for i, known in enumerate(self.known):
            if known:
                self.points[i] = self.points[i] - self.tau * self.u[i]

    def _cautious(self):
        """The cap where the ramp ends before it has said anything, from the definition of S."""
        _, slope, norm, _ = np.array(self.rows, dtype=float).T
        r = slope[1:] / norm[:-1]
        S = np.concatenate([[0.0], np.cumsum(np.clip(r, -1, 1) - 0.15)])
        best, k = int(np.argmax(S)), len(self.rows)
        noise = np.median(np.abs(np.diff(r))) / 0.95 if k > 4 else np.inf
        sizes = self.first_size * 2.0 ** (np.arange(k) / 3)
        strong = best > 0 and S[best] >= 4 * noise * np.sqrt(best)
        return 0.3 * np.sqrt((sizes[best - 1] if strong else 0.1 * sizes[-1]) * sizes[-1])

    def _end(self, cap):
        self.cap, self.searching = cap, False
        self.points = [np.array(o if k else p) for o, p, k in zip(self.origins, self.points, self.known)]
        self._begin_average()
