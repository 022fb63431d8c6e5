"""Run a training script that nobody changed, with the names of the MoMo optimizers known.

    python -m momo_hf SCRIPT.py --optim momo_adam ...
    python -m momo_hf -m trl.scripts.sft --optim momo_adam ...
    accelerate launch -m momo_hf SCRIPT.py ...
    torchrun --nproc_per_node 2 -m momo_hf SCRIPT.py ...

The script or module runs as `python` itself would run it: as `__main__`, with its arguments in `sys.argv` and its folder
on `sys.path`. Processes that it starts with `multiprocessing`, by any start method, know the names too.
"""

import importlib.machinery
import io
import os
import runpy
import sys
import types
from typing import NoReturn

from momo_hf.integrations import children


def run_script(path: str, main: types.ModuleType) -> None:
    """Run a file as `python PATH` does; `main` is its module.

    `runpy.run_path` would not: it leaves `sys.path` and `__file__` as they are, and takes `__main__` away at the end,
    before what the script leaves for the exit of the interpreter.
    """
    file = os.path.abspath(path)
    if not getattr(sys.flags, "safe_path", False):  # of Python 3.11
        sys.path[0] = os.path.dirname(os.path.realpath(file) if os.path.islink(file) else file)
    try:
        with io.open_code(file) as opened:
            code = compile(opened.read(), file, "exec")
    except OSError as error:
        fail(f"python -m momo_hf: can't open file {file!r}: {error.strerror}")
    loader = importlib.machinery.SourceFileLoader("__main__", file)
    main.__dict__.update(__file__=file, __cached__=None, __loader__=loader)
    exec(code, main.__dict__)


def fail(message: str) -> NoReturn:
    """Say what is wrong and end, as python does with a wrong command line."""
    sys.stderr.write(f"{message}\n")
    sys.exit(2)


def main() -> None:
    """Read the command line: `SCRIPT.py ARGUMENTS` or `-m MODULE ARGUMENTS`."""
    arguments = sys.argv[1:]
    is_module = arguments[:1] == ["-m"]
    sys.argv = arguments[is_module:]
    if sys.argv[:1] in (["-h"], ["--help"]):
        sys.stdout.write(str(__doc__))
        sys.exit()
    if not sys.argv or sys.argv[0].startswith("-"):
        fail(__doc__)
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    main.__annotations__ = {}
    children.install()
    if is_module:
        # The function that `python -m` calls, by this name in every version; typeshed leaves it out.
        runpy._run_module_as_main(sys.argv[0])  # type: ignore[attr-defined]
    else:
        run_script(sys.argv[0], main)


if __name__ == "__main__":
    main()
