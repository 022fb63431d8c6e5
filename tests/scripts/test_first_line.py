"""Every script speaks before it imports what takes long."""

import pytest

from tests.processes import start


# Ends the script at its first import of what does not come with Python; `org` is of Jython, and `copy` looks for it.
CODE = """
import runpy, sys

class End:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] not in {*sys.stdlib_module_names, "org"}:
            sys.exit(f"imports {name}")

sys.meta_path.insert(0, End)
runpy.run_path(sys.argv[1], run_name="__main__")
"""
# `counted` is a module of another one.
SCRIPTS = sorted(path.name for path in (start.ROOT / "scripts").glob("*.py") if path.name != "counted.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_line_at_once(script):
    ended = start.run("-c", CODE, f"scripts/{script}", cold=True)
    assert ended.stdout == "Loading libraries ...\n" and ended.stderr.startswith("imports ")
