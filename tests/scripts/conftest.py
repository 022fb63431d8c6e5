"""Run a script as a user would, in a process of its own."""

import re
from pathlib import Path

import pytest

from tests.processes import start


ROOT = Path(__file__).parents[2]


def documented(word):
    """The one Python block of README.md and configs/README.md that holds a word."""
    text = "\n".join(path.read_text("utf-8") for path in (ROOT / "README.md", ROOT / "configs" / "README.md"))
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (block,) = (block for block in blocks if word in block)
    return block


@pytest.fixture
def run_script(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")

    def run(*command, check=True, cold=False):
        """`command`: script and arguments; `check`: fail the test if the script fails; `cold`: see `start`.

        Every script is started cold by one test at least.
        """
        environment = {"HOME": str(home), "MPLCONFIGDIR": str(home / "..")}
        result = start.run(*command, environment=environment, cold=cold)
        if check and result.returncode != 0:
            pytest.fail(f"{command} ended with {result.returncode}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}")
        # Nothing is written outside the output folder.
        assert list(home.rglob("*")) == [] == list(Path(start.server()[0] / "home").rglob("*"))
        return result

    return run
