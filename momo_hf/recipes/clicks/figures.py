"""The picture of a click model: whether its probabilities are the shares of clicks."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.calibration import CalibrationDisplay


BINS = 10


def plot_calibration(labels: np.ndarray, probabilities: np.ndarray, folder: str | Path) -> Path | None:
    """Draw clicks over predicted clicks, in bins of equally many rows, and the predictions, as `calibration.png`.

    Args:
        labels: 0 or 1, shape (rows,).
        probabilities: of a click, float of shape (rows,).
        folder: where the file is written.

    Returns:
        Its path; None where a probability is not a number.
    """
    if not np.isfinite(probabilities).all():
        return None
    figure = Figure(figsize=(5, 5.6), layout="constrained")
    curve, counts = figure.subplots(2, 1, height_ratios=[4, 1], sharex=True)
    CalibrationDisplay.from_predictions(
        labels,
        probabilities,
        n_bins=BINS,
        strategy="quantile",
        pos_label=1,
        ax=curve,
        name=f"{BINS} bins of equal size",
    )
    curve.set(title=f"Calibration on {len(labels)} held-out rows", xlabel="", ylabel="share of clicks")
    curve.grid(alpha=0.3)
    counts.hist(probabilities, bins=40, range=(0, 1), color="tab:blue", alpha=0.6)
    counts.set(xlabel="predicted probability of a click", ylabel="rows")
    path = Path(folder) / "calibration.png"
    figure.savefig(path, dpi=100)
    return path
