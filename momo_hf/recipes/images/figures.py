"""The picture of a classifier: what it takes for what."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix


READABLE = 25  # classes


def plot_confusion(labels: np.ndarray, predictions: np.ndarray, names: list[str], folder: str | Path) -> Path:
    """Draw the confusion matrix, each true class as shares of its images, as `confusion.png`.

    Args:
        labels: class numbers, int of shape (images,).
        predictions: the same, as predicted.
        names: of the classes.
        folder: where the file is written.

    Returns:
        Its path.
    """
    shares = confusion_matrix(labels, predictions, labels=range(len(names)), normalize="true")
    readable = len(names) <= READABLE
    side = 2 + 0.5 * min(len(names), READABLE)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    ConfusionMatrixDisplay(shares, display_labels=names if readable else None).plot(
        ax=axes,
        include_values=readable,
        values_format=".2g",
        text_kw={"fontsize": 8},
        cmap="Blues",
        colorbar=False,
        xticks_rotation="vertical" if max(map(len, names)) > 3 else "horizontal",
    )
    if not readable:
        axes.set(xticks=[], yticks=[])
    axes.set(title=f"Shares of each true class, {len(labels)} images", xlabel="predicted", ylabel="true")
    path = Path(folder) / "confusion.png"
    figure.savefig(path, dpi=100)
    return path
