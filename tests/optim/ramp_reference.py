"""The search for the cap written out in float64 NumPy: the rule from its whole history, and a ramp of Adam or SGD steps."""

import numpy as np


def sizes(start, count, lowered):
    """The step sizes of a ramp; the first leaves the 20 shortest steps out, and one that begins anew none."""
    return start * 2.0 ** ((np.arange(count) + 20 * (not lowered)) / 3)


def verdict(rows, start, lowered=False):
    """The rule at one step, from all rows (f, <g, u before>, <d, u>, <g, D^-1 g>) so far: ("", None) or reason and cap.

    Args:
        rows: of the ramp.
        start: the first step size of a whole ramp.
        lowered: whether it began anew. Only one that did not may be told to ("too high", None).
    """
    k = len(rows)
    f, slope, norm, sample = np.array(rows, dtype=float).T
    alpha = sizes(start, k, lowered)
    r = slope[1:] / norm[:-1]
    S = np.concatenate([[0.0], np.cumsum(np.clip(r, -1, 1) - 0.15)])
    if k == 12 and not lowered and S[-1] < 2:
        return "too high", None
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
    if k >= (60 if lowered else 40):
        return (
            ("the end of the ramp", cap) if strong else ("nothing found", min(300 * start, 0.3 * np.sqrt(a_S * end)))
        )
    return "", None


def warmup(search):
    """The steps of the warmup after a search: those of its ramp, with the 20 that a first one leaves out."""
    return len(search.losses) + (20 if search.steps == len(search.losses) else 0)


def ramp(x, gradient, beta2=0.999, start=1e-6, beta=0.9, corrected=True, clip=None):
    """Steps from x until the rule ends them.

    Args:
        x: the parameters as one vector.
        gradient: takes x and the number of the step, returns loss and gradient.
        beta2: Adam's, or None for the momentum alone.
        start: the first step size of a whole ramp; None for a ten thousandth of Polyak's, the loss over its slope.
        corrected: whether the momentum starts at 0 and is corrected.
        clip: the norm that gradients are clipped to.

    Returns:
        The rows of the ramp that found something, the reason, the cap, the sizes of all steps, and how many of them were of a
        ramp that began too high.
    """
    origin, taken, given, before_it = x, [], start, 0
    while True:
        d, v, before, rows, x = np.zeros_like(origin), np.zeros_like(origin), None, [], origin.copy()
        for k in range(1, 61):
            loss, g = gradient(x, len(taken) + 1)
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
            if k == 1 and given is None:
                start = 1e-4 * kappa * loss / rows[0][2]
            taken.append(sizes(start, k, before_it > 0)[-1])
            reason, cap = verdict(rows, start, before_it > 0)
            if reason == "too high":
                before_it = k
                break
            if reason:
                return rows, reason, cap, taken, before_it
            x -= taken[-1] * u
            before = u
