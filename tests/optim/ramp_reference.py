"""The search for the cap written out in float64 NumPy: the rule from its whole history, and a ramp of Adam or SGD steps."""

import numpy as np


def verdict(rows, start, kappa=1.0):
    """The rule at one step, from all rows (f, <g, u before>, <d, u>, <g, D^-1 g>) so far: ("", None) or reason and cap."""
    k = len(rows)
    f, slope, norm, sample = np.array(rows, dtype=float).T
    alpha = start * 2.0 ** (np.arange(k) / 3)
    r = slope[1:] / norm[:-1]
    S = np.concatenate([[0.0], np.cumsum(np.clip(r, -1, 1) - 0.15)])
    best = int(np.argmax(S))  # the first of equals; 0: never above 0
    a_S = alpha[max(best - 1, 0)]
    noise = np.median(np.abs(np.diff(r))) / 0.95 if k > 4 else np.inf
    strong = best > 0 and S[best] >= 4 * noise * np.sqrt(best)
    end = alpha[-1]
    cap = 0.3 * np.sqrt((a_S if strong else 0.1 * end) * end)
    if k > 12 and strong and S[best] - S[-1] >= max(2.0, 6 * noise):
        return "overshoot", cap
    scatter = np.median(np.abs(np.diff(np.log(np.maximum(sample, 1e-30))))) / 0.95 if k > 1 else 0.0
    if k > 12 and not strong and np.median(sample[-5:]) > max(3, np.exp(2 * scatter)) * np.median(sample):
        return "harm", cap
    if k >= 60:
        return (
            ("the end of the ramp", cap) if strong else ("nothing found", min(3e2 * start, 0.3 * np.sqrt(a_S * end)))
        )
    return "", None


def fall(first, gaps, beta=0.9, corrected=True):
    """The factor of the cap for the coming step.

    Args:
        first: f - lb of the steps of the search.
        gaps: f - lb of the steps since then.
        beta: β of their average.
        corrected: whether it starts at 0 and is corrected, or at the first of them.
    """
    if len(first) < 5 or not gaps or np.mean(first[:5]) <= 0:
        return 1.0
    weights = (1 - beta) * beta ** np.arange(len(gaps))[::-1]
    if not corrected:
        weights[0] = beta ** (len(gaps) - 1)
    left = np.sum(weights * gaps) / np.sum(weights) / (0.1 * np.mean(first[:5]))
    return np.sqrt(min(left, 1.0)) if left >= 0 else 1.0


def ramp(x, gradient, beta2=0.999, start=1e-6, beta=0.9, corrected=True, clip=None):
    """Steps from x until the rule ends them; a list of rows, the reason and the cap.

    Args:
        x: the parameters as one vector.
        gradient: takes x and the number of the step, returns loss and gradient.
        beta2: Adam's, or None for the momentum alone.
        start: the first step size; None for a ten thousandth of Polyak's, the loss over its slope.
        corrected: whether the momentum starts at 0 and is corrected.
        clip: the norm that gradients are clipped to.
    """
    d, v, before, rows, k = np.zeros_like(x), np.zeros_like(x), None, [], 0
    x = x.copy()
    while True:
        k += 1
        loss, g = gradient(x, k)
        kappa = 1.0 if clip is None else min(1.0, clip / (np.linalg.norm(g) + 1e-6))
        g = kappa * g
        d = beta * d + (1 - beta) * g if corrected or k > 1 else g
        rho = 1 - beta**k if corrected else 1.0
        if beta2 is None:
            D = np.ones_like(x)
        else:
            v = beta2 * v + (1 - beta2) * g * g
            D = np.sqrt(v / (1 - beta2**k)) + 1e-8
        u = d / rho / D
        slope = 0.0 if before is None else g @ before
        rows.append((loss, slope, (d / rho) @ u, g @ (g / D) / kappa))
        if start is None:
            start = 1e-4 * kappa * loss / rows[0][2]
        reason, cap = verdict(rows, start)
        if reason:
            return rows, reason, cap
        x -= start * 2 ** ((k - 1) / 3) * u
        before = u
