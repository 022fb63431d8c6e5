"""Draw the paper's figure for any task: the final value against the learning rate, for several optimizers.

    python scripts/sweep_lr.py configs/sweeps/demo.yaml

An interrupted sweep continues where it was. To share one between machines, give all of them the same `--storage`, the
URL of a database server that optuna knows, and start the command on each.
"""

import argparse
import logging
import os
import signal
from pathlib import Path


if __name__ == "__main__":
    print("Loading libraries ...", flush=True)

import optuna

from momo_hf.recipes.ending import end
from momo_hf.recipes.errors import run_main
from momo_hf.recipes.sweeps.config import Sweep, load_sweep
from momo_hf.recipes.sweeps.queue import reserve
from momo_hf.recipes.sweeps.results import collect, number_finished, summary
from momo_hf.recipes.sweeps.running import work
from momo_hf.recipes.sweeps.workers import run_workers


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a file of configs/sweeps")
    parser.add_argument("--output_dir", help="instead of the config's")
    parser.add_argument("--storage", help="URL of optuna's storage; default: sqlite in the output folder")
    parser.add_argument("--workers", type=int, help="runs at once, instead of the config's")
    parser.add_argument("--show_only", action="store_true", help="table and figure of what is there, without new runs")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sweep = load_sweep(args.config, output_dir=args.output_dir, storage=args.storage, workers=args.workers)
    if args.worker is not None:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        # As Ctrl-C does: the point that is cut off is free at once for the next start.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        work(sweep, args.worker)
        return 0
    failed = 0 if args.show_only else run(sweep, args)
    show(sweep)
    return failed


def run(sweep: Sweep, args: argparse.Namespace) -> int:
    """Start the workers and wait for them; returns the number of workers that broke down."""
    studies = {name: sweep.study(name) for name in sweep.optimizers}
    for name, study in studies.items():
        reserve(study, sweep.points(name))
    options = ["--output_dir", sweep.output_dir] + (["--storage", sweep.storage] if sweep.storage else [])
    broken = run_workers(
        [__file__, args.config, *options],
        sweep.workers,
        sweep.output_dir,
        threads=max(1, (os.cpu_count() or 1) // sweep.workers),
        progress=lambda: (number_finished(sweep, studies), sweep.number_of_runs),
    )
    for log in broken:
        print(f"A worker broke down; see {log}. Start again to continue.")
    return len(broken)


def show(sweep: Sweep) -> None:
    runs = collect(sweep)
    if runs.empty:
        print("No run has finished yet.")
        return
    folder = Path(sweep.output_dir)
    runs.drop(columns="history").to_csv(folder / "sweep.csv", index=False)
    table = summary(sweep, runs).to_markdown(index=False, floatfmt=".4g")
    (folder / "sweep.md").write_text(table + "\n", "utf-8")
    from momo_hf.recipes.sweeps.figures import plot_sweep  # late, so that the runs begin sooner

    paths = plot_sweep(sweep, runs)
    print(f"{sweep.metric} ({sweep.direction}), mean over seeds {sweep.seeds}:\n\n{table}\n")
    print(f"See {', '.join(map(str, [folder / 'sweep.csv', *paths]))}")


if __name__ == "__main__":
    end(run_main(main))
