"""The picture of a run: its losses, its step sizes and the cap, its scores."""

import json
import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from momo_hf.integrations.callback import CAPPED


TRAINING = "training.png"
STEP_SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "learning_rate": ("learning rate", {"color": "0.4", "linestyle": "--"}),
    "momo/polyak_lr": ("without the cap (polyak_lr)", {"color": "tab:orange", "linewidth": 1}),
    "momo/effective_lr": ("step size taken (effective_lr)", {"color": "tab:blue", "linewidth": 2.5, "alpha": 0.7}),
}
NO_SCORES = ("loss", "runtime", "per_second")
SEARCH = "search.json"  # what a search for the cap leaves in the folder of a run


def plot_training(history: list[dict[str, Any]], folder: str | Path) -> Path | None:
    """Draw the log of a run: of a Trainer, `trainer.state.log_history`, or of a loop in the same form.

    Args:
        history: entries with `step` and some of `loss`, `eval_loss`, `learning_rate`, `momo/effective_lr`,
            `momo/polyak_lr`, `momo/capped_in_all` and further `eval_` scores. Values that are no finite number are left out.
        folder: where `training.png` is written. Where it has a `search.json` too, the picture shows which steps were the
            search.

    Returns:
        The path of the file; None where nothing was logged.
    """
    scores = [name for name in _names(history) if name.startswith("eval_") and not name.endswith(NO_SCORES)]
    scores = [name for name in scores if len(_points(history, name)[0]) > 1]
    momo = any("momo/effective_lr" in entry for entry in history)
    if not _points(history, "loss")[0]:
        return None
    panels = 3 if scores else 2
    figure = Figure(figsize=(4.6 * panels, 3.9), layout="constrained")
    losses, steps, *rest = figure.subplots(1, panels, sharex=True)
    _lines(losses, history, {"loss": ("training", {}), "eval_loss": ("held out", {"marker": "o", "markersize": 4})})
    losses.set(title="Loss", yscale="log" if _spans(losses, 10) else "linear")
    _mark_search((losses, steps), history, Path(folder) / SEARCH)
    shown = (
        dict(STEP_SIZES, learning_rate=("cap (learning rate)", STEP_SIZES["learning_rate"][1])) if momo else STEP_SIZES
    )
    _lines(steps, history, shown, positive=True)
    steps.set(title=_title_of_steps(history, momo), yscale="log")
    for axes in rest:
        marked = {"marker": "o", "markersize": 4}
        _lines(axes, history, {name: (name.removeprefix("eval_"), marked) for name in scores})
        axes.set(title="Held-out scores")
    for axes in (losses, steps, *rest):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        # Under the axes it hides no curve.
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    path = Path(folder) / TRAINING
    figure.savefig(path, dpi=100)
    return path


def _mark_search(panels: tuple[Axes, Axes], history: list[dict[str, Any]], path: Path) -> None:
    """Shade the steps of the search, and leave the losses empty that are averages over some of them."""
    length = json.loads(path.read_text("utf-8"))["steps"] if path.is_file() else 0
    if length == 0:
        return
    for axes in panels:
        axes.axvspan(0, length, color="tab:red", alpha=0.12, linewidth=0, label=f"search ({length} steps)")
    at, losses = _points(history, "loss")
    mixed = sum(before < length for before in [0, *at[:-1]])
    panels[0].plot(
        at[:mixed],
        losses[:mixed],
        marker="o",
        markersize=6,
        linestyle="",
        markerfacecolor="white",
        color="tab:red",
        label="with losses of the search",
    )


def _names(history: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for entry in history for name in entry))


def _points(history: list[dict[str, Any]], name: str, positive: bool = False) -> tuple[list[float], list[float]]:
    values = [(entry["step"], entry[name]) for entry in history if isinstance(entry.get(name), (int, float))]
    values = [(step, value) for step, value in values if math.isfinite(value) and (value > 0 or not positive)]
    return [step for step, _ in values], [value for _, value in values]


def _lines(
    axes: Axes, history: list[dict[str, Any]], names: dict[str, tuple[str, dict[str, Any]]], positive: bool = False
) -> None:
    for name, (label, style) in names.items():
        at, values = _points(history, name, positive)
        if at:
            axes.plot(at, values, label=label, **style)


def _spans(axes: Axes, factor: float) -> bool:
    low, high = axes.dataLim.intervaly
    return low > 0 and high > factor * low


def _title_of_steps(history: list[dict[str, Any]], momo: bool) -> str:
    _, shares = _points(history, CAPPED)
    if not shares:
        return "Step size" if momo else "Learning rate"
    return f"Step size (the cap decided {shares[-1]:.0%} of the steps)"
