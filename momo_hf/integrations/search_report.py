"""What a search for the cap has seen, in the folder of a run: `search.json` and, where matplotlib is there, `search.png`."""

import json
import logging
import math
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from momo_hf.optim import MomoOptimizer
from momo_hf.optim.steps.search import CAP_FACTOR, FIRST, LEFT, OVERSHOOT, REASONS, STEPS, WEAK, Search


if TYPE_CHECKING:
    from matplotlib.figure import Figure  # not everybody has it

logger = logging.getLogger(__name__)

# What stands under the picture, and how the rule that ended a search reads there.
EXPLAINED = (
    f"Every step is longer than the one before. S adds up the share of its slope that each step has left over, less {LEFT}: it "
    "rises while steps are too short, is highest where they use their slope up (α_S), and falls where they overshoot, that is, "
    "go beyond the minimum along their own line. α_end is the size of the last step. The loss may still fall far to the right of "
    f"the cap: a few steps of that size do no harm yet, but thousands would. The factor {CAP_FACTOR} was chosen on recorded "
    "searches."
)
ENDED = dict(
    zip(
        REASONS[1:],
        (
            "S has fallen by {fall:.1f} from its top: steps overshoot",
            "gradients have grown, and S had not risen out of its noise",
            "a loss or a gradient was not finite",
            "this was its last step",
            "this was its last step, and S has not risen out of its noise",
        ),
    )
)


class SearchReport:
    """Writes the files as soon as the search of an optimizer is over; nothing if there is none, or if it was over before.

    Args:
        optimizer: the MoMo optimizer itself, without wrappers.
        folder: of the run.
        writes: whether this process writes, as the main one does.
        steps: that training is going to take.
    """

    def __init__(self, optimizer: MomoOptimizer, folder: str | Path, writes: bool, steps: int) -> None:
        self._optimizer, self._folder, self._writes = optimizer, Path(folder), writes
        self._due = optimizer.searching
        search = optimizer.search
        if self._due and writes and search is not None and search.steps + steps <= STEPS:
            logger.warning(
                f"This training has {steps} steps, and the search for the cap takes {FIRST + 1} to {STEPS} in all, so it may end "
                "before anything is learnt. Train longer, or give a learning rate."
            )

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
        if search.steps == 0:
            logger.warning(
                "Nothing could be found: no step of the search for the cap was usable, because loss or gradients were not "
                "finite from the start. The weights are what they were. Look for the first number that is not finite."
            )
            return
        if search.cap is None:
            logger.warning(
                f"Training ended after {search.steps} steps of the search for the cap, before anything was learnt, and the "
                "weights are in the middle of it."
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
    figure = Figure(figsize=(7.5, 6.5), layout="constrained")
    draw_search(search, figure)
    figure.savefig(folder / "search.png", dpi=110)


def draw_search(search: Search, figure: "Figure") -> None:
    """Draw loss and S against the step size, what ended the search, and where the cap comes from.

    Args:
        search: with one step at least.
        figure: an empty `matplotlib.figure.Figure`.
    """
    above, below = figure.subplots(2, 1, sharex=True)
    sizes, sums = search.step_sizes, search.sums[1:]  # S at a step has what the step before it left over
    for axes, values, name in ((above, search.losses, "loss"), (below, sums, "S")):
        axes.plot(sizes[: len(values)], values, ".-", color="tab:blue", linewidth=1)
        axes.set(xscale="log", ylabel=name)
        axes.grid(alpha=0.3)
    first, low = search.losses[0], min(search.losses)
    # Where it blows up, what came before would be a line at the bottom.
    shown = [loss for loss in search.losses if loss <= first + 3 * max(first - low, 0.1 * abs(first))]
    margin = 0.05 * (max(shown) - low) or 0.1
    above.set_ylim(low - margin, max(shown) + margin)
    below.set_xlabel("size of the step")
    figure.supxlabel(fill(EXPLAINED, 125), fontsize=8, x=0.02, ha="left", linespacing=1.4)
    if search.cap is None:
        figure.suptitle("Search for the cap: not finished")
        return
    figure.suptitle(f"Search for the cap: {search.cap:.2g} after {search.steps} steps ({search.reason})")
    made_of, formula = _origin_of_the_cap(search, search.cap)
    for axes in (above, below):
        for (name, size), style in zip(made_of.items(), (":", "-.")):
            axes.axvline(size, color="0.4", linestyle=style, label=f"{name} = {size:.2g}")
        axes.axvline(search.cap, color="tab:red", label=f"cap = {search.cap:.2g}{formula}")
    above.legend(fontsize=8)
    fall = max(sums, default=0.0) - search.sums[-1]
    below.set_title(f"The search ended because {ENDED[search.reason].format(fall=fall)}.", fontsize=9, loc="left")
    if search.reason == REASONS[int(OVERSHOOT)]:
        top, last = (_turn(search), max(sums)), (sizes[-2], sums[-1])
        below.hlines(top[1], top[0], last[0], color="tab:orange", linestyle="--")
        arrow = {"arrowstyle": "->", "color": "tab:orange", "shrinkA": 0, "shrinkB": 0}
        below.annotate("", last, (last[0], top[1]), arrowprops=arrow)


def _turn(search: Search) -> float:
    """α_S: the size of the step after which S was largest."""
    sums = search.sums[1:]
    return search.step_sizes[sums.index(max(sums))] if sums else search.step_sizes[0]


def _origin_of_the_cap(search: Search, cap: float) -> tuple[dict[str, float], str]:
    """The step sizes that the cap was made of, and the formula; no step sizes where it is a cautious one."""
    turn, end = _turn(search), search.step_sizes[-1]
    if math.isclose(cap, CAP_FACTOR * math.sqrt(turn * end), rel_tol=1e-3):
        return {"α_S": turn, "α_end": end}, f" = {CAP_FACTOR} √(α_S α_end)"
    if math.isclose(cap, CAP_FACTOR * math.sqrt(WEAK) * end, rel_tol=1e-3):
        return {"α_end": end}, f" = {CAP_FACTOR} √{WEAK} α_end"
    return {}, ", a cautious one"
