"""Several finished sweeps in one table and one picture: how far every optimizer is from the best AdamW of its grid.

    python scripts/compare_sweeps.py configs/sweeps/demo.yaml configs/sweeps/mnist_mlp.yaml --output compare

It reads what scripts/sweep_lr.py left in the output folders of the sweeps and runs nothing.
"""

import argparse
from pathlib import Path


if __name__ == "__main__":
    print("Loading libraries ...", flush=True)

import pandas as pd

from momo_hf.recipes.ending import end
from momo_hf.recipes.errors import run_main
from momo_hf.recipes.sweeps.comparison import compare, plot_comparison


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="+", help="files of configs/sweeps whose sweeps have been run")
    parser.add_argument("--output_dir", help="where the sweeps' folders are, if not where their configs say")
    parser.add_argument("--output", default="compare", help="name of the .md and .png to write")
    args = parser.parse_args()
    rows = pd.DataFrame([row for path in args.sweeps for row in compare(path, args.output_dir)])
    table = rows.to_markdown(index=False, floatfmt=".4g")
    Path(f"{args.output}.md").write_text(table + "\n", "utf-8")
    plot_comparison(rows, Path(f"{args.output}.png"))
    print(f"{table}\n\nSee {args.output}.md and {args.output}.png")


if __name__ == "__main__":
    end(run_main(main))
