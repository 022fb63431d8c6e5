"""The reference: a page of every public name, made from the docstrings.

    python .ci/reference.py [FOLDER]

What pdoc warns of is an error.
"""

import sys
import warnings
from pathlib import Path

import pdoc

import momo_hf


if __name__ == "__main__":
    folder = Path(*sys.argv[1:] or ["build/reference"])
    for name in momo_hf.__all__:
        setattr(momo_hf, name, getattr(momo_hf, name))  # pdoc looks at what is there, and some of it is imported late
    pdoc.render.configure(docformat="google")
    warnings.simplefilter("error", UserWarning)
    pdoc.pdoc("momo_hf", output_directory=folder)
    sys.stdout.write(f"{folder / 'momo_hf.html'}\n")
