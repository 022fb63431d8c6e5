"""Optimizers beside the best AdamW of a grid, by held-out loss, on small tasks of many kinds or on one of your own.

    python scripts/yardstick.py --tasks digits --rivals adamw --steps 200
    python scripts/yardstick.py --tasks my_task.py --rivals adamw momo_muon_auto
    python scripts/yardstick.py --data FOLDER

The last runs the whole table, for hours. It runs every point of a grid once, and what may be best with all seeds. An
interrupted command goes on where it was; a run is done anew only where its task, its rival or their code has changed.
Results lie in `output_dir`: yardstick.csv (every run), yardstick.md (the tables), yardstick.png.
"""

import argparse
import logging
import os
import signal
import sys
from collections import Counter
from pathlib import Path


if __name__ == "__main__":
    print("Loading libraries ...", flush=True)

import datasets
import optuna
import transformers

from momo_hf.recipes.ending import end
from momo_hf.recipes.errors import InputError, run_main
from momo_hf.recipes.sweeps.workers import run_workers
from momo_hf.recipes.yardstick.data import Places
from momo_hf.recipes.yardstick.figures import plot
from momo_hf.recipes.yardstick.grids import plot_grid
from momo_hf.recipes.yardstick.plan import Plan
from momo_hf.recipes.yardstick.results import collect
from momo_hf.recipes.yardstick.rivals import load_rivals
from momo_hf.recipes.yardstick.running import work
from momo_hf.recipes.yardstick.tables import tables
from momo_hf.recipes.yardstick.task import load_task
from momo_hf.recipes.yardstick.tasks import TASKS


RIVALS = Path(__file__).parents[1] / "configs" / "yardstick.yaml"


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tasks", nargs="+", default=list(TASKS), metavar="TASK", help="names, or .py files; default: all"
    )
    parser.add_argument(
        "--rivals",
        nargs="+",
        default=[],
        metavar="RIVAL",
        help=f"rows of {RIVALS.name}, or .yaml files; default: all rows. The first is what the others are measured by",
    )
    parser.add_argument("--steps", type=int, help="of every run; default: as the task says, mostly 1,000")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first is that of the grids")
    parser.add_argument("--data", type=Path, help="folder with a folder for each data set, see configs/README.md")
    parser.add_argument(
        "--whole_grids",
        action="store_true",
        help="every point of a grid with all seeds, and a picture of each task: the loss against the learning rate",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/yardstick"))
    parser.add_argument("--storage", help="URL of optuna's storage; default: sqlite in the output folder")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at once, of one thread each")
    parser.add_argument(
        "--show_only", action="store_true", help="tables and figure of what is there, without new runs"
    )
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def make_plan(args: argparse.Namespace) -> tuple[Plan, list[str]]:
    """What is to be run, and what is left out and why."""
    for name in ("steps", "workers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"`{name}` must be 1 or more, got {value}.")
    if args.data is not None and not args.data.is_dir():
        raise InputError(f"--data {args.data} is not a folder (looked for {args.data.absolute()}).")
    places = Places(args.data, args.output_dir / "prepared")
    tasks, rivals = [load_task(name) for name in args.tasks], load_rivals(args.rivals, RIVALS)
    twice = [name for name, number in Counter(task.name for task in tasks).items() if number > 1]
    if twice:
        raise InputError(f"two tasks have the name {twice[0]!r}: rename one of the files.")
    missing = {task.name: task.missing(places) for task in tasks} | {rival.name: rival.missing() for rival in rivals}
    tasks = [task for task in tasks if missing[task.name] is None]
    rivals = [rival for rival in rivals if missing[rival.name] is None]
    left_out = [f"{name} is left out: {reason}." for name, reason in missing.items() if reason is not None]
    if not tasks or not rivals:
        raise InputError(" ".join(left_out))
    plan = Plan(tasks, rivals, args.seeds, args.steps, places, args.output_dir, args.storage, args.whole_grids)
    return plan, left_out


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    sys.path.append(os.getcwd())  # for the modules of rivals
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    transformers.utils.logging.set_verbosity_error()  # it warns of what the tasks do on purpose
    plan, left_out = make_plan(args)
    if args.worker is not None:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
        # As Ctrl-C does: the run that is cut off is free at once for the next start.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        work(plan, args.worker)
        return 0
    for line in left_out:
        print(line)
    failed = 0
    if not args.show_only:
        studies = plan.studies()
        broken = run_workers(
            [__file__, *argv], args.workers, plan.output_dir, threads=1, progress=lambda: plan.progress(studies)
        )
        failed = len(broken)
        for log in broken:
            print(f"A worker broke down; see {log}. Start again to continue.")
    show(plan)
    return failed


def show(plan: Plan) -> None:
    runs = collect(plan)
    if runs.empty:
        print("No run has finished yet.")
        return
    table, folder = tables(plan, runs), plan.output_dir
    runs.to_csv(folder / "yardstick.csv", index=False)
    (folder / "yardstick.md").write_text(table + "\n", "utf-8")
    pictures = [plot(plan, runs, folder / "yardstick.png")]
    if plan.whole_grids:
        started = [task for task in plan.tasks if task.name in set(runs["task"])]
        pictures += [plot_grid(plan, runs, task, folder / f"{task.name}.png") for task in started]
    crashed = runs[runs["outcome"].str.startswith("crashed")].drop_duplicates(["task", "optimizer"])
    for row in crashed.itertuples():
        print(f"{row.task}, {row.rival}: {row.outcome}")
    print(f"\n{table}\n\nSee {', '.join(map(str, [folder / 'yardstick.csv', *pictures]))}")


if __name__ == "__main__":
    end(run_main(main))
