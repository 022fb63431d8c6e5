"""What a search for the cap has seen, in the folder of a run: `search.json` and, where matplotlib is there, `search.png`."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from momo_hf.optim import MomoOptimizer
from momo_hf.optim.search import STEPS, Search


if TYPE_CHECKING:
    from matplotlib.figure import Figure  # not everybody has it

logger = logging.getLogger(__name__)


class SearchReport:
    """Writes the files as soon as the search of an optimizer is over; nothing if there is none, or if it was over before.

    Args:
        optimizer: the MoMo optimizer itself, without wrappers.
        folder: of the run.
        writes: whether this process writes, as the main one does.
    """

    def __init__(self, optimizer: MomoOptimizer, folder: str | Path, writes: bool) -> None:
        self._optimizer, self._folder, self._writes = optimizer, Path(folder), writes
        self._due = optimizer.searching

    def after_step(self) -> None:
        """Note that a step was taken; nothing is read from the device until the search is over."""
        if self._due and not self._optimizer.searching:
            self.at_end()

    def at_end(self) -> None:
        """Write what is there at the end of training, and say so if the search has not come to an end."""
        if not self._due:
            return
        self._due, search = False, self._optimizer.search
        if search is None or not self._writes:
            return
        if search.cap is None and search.steps > 0:
            logger.warning(
                f"Training ended after {search.steps} steps of the search for the cap, before anything was learnt, and the "
                f"weights are in the middle of it. It takes {STEPS} steps at most: train longer, or give a learning rate."
            )
        try:
            write_search(search, self._folder)
        except OSError as error:
            logger.warning(f"The search for the cap could not be written to {self._folder}: {error}")


def write_search(search: Search, folder: Path) -> None:
    """Write `search.json` and `search.png` into a folder.

    Args:
        search: with one step at least.
        folder: made if it is not there.

    Raises:
        OSError: they could not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "search.json").write_text(json.dumps(search._asdict(), indent=2) + "\n", "utf-8")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning(f"{folder}/search.png was not drawn: it needs matplotlib (pip install matplotlib).")
        return
    figure = Figure(figsize=(7, 5), layout="constrained")
    draw_search(search, figure)
    figure.savefig(folder / "search.png", dpi=110)


def draw_search(search: Search, figure: "Figure") -> None:
    """Draw loss and signal against the step size, and the cap.

    Args:
        search: with one step at least.
        figure: an empty `matplotlib.figure.Figure`.
    """
    above, below = figure.subplots(2, 1, sharex=True)
    for axes, values, name in ((above, search.losses, "loss"), (below, search.sums, "S: slope left by steps, summed")):
        axes.plot(search.step_sizes, values, ".-", color="tab:blue", linewidth=1)
        axes.set(xscale="log", ylabel=name)
        axes.grid(alpha=0.3)
        if search.cap is not None:
            axes.axvline(search.cap, color="tab:red", label=f"cap {search.cap:.2g}")
    first, low = search.losses[0], min(search.losses)
    # Where it blows up, what came before would be a line at the bottom.
    shown = [loss for loss in search.losses if loss <= first + 3 * max(first - low, 0.1 * abs(first))]
    margin = 0.05 * (max(shown) - low) or 0.1
    above.set_ylim(low - margin, max(shown) + margin)
    below.set_xlabel("step size")
    if search.cap is not None:
        above.legend()
    end = f"cap {search.cap:.2g} after {search.steps} steps ({search.reason})" if search.reason else "not finished"
    figure.suptitle(f"Search for the cap: {end}")
