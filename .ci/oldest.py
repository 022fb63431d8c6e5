"""The oldest versions that pyproject.toml allows, for `pip install`: every floor of the package and of its extras as ==.

    python .ci/oldest.py EXTRA ...

torch is left out, see `.ci/oldest`.
"""

import re
import sys
from pathlib import Path

import tomllib


def oldest(project: dict, extras: list[str]) -> list[str]:
    """The floors of the dependencies and of some extras, as `name==version`."""
    found: list[str] = []
    for requirement in [*project["dependencies"], *(r for e in extras for r in project["optional-dependencies"][e])]:
        own = re.fullmatch(r"momo-hf\[(.+)\]", requirement)
        if own:
            found += oldest({**project, "dependencies": []}, own.group(1).split(","))
        elif not requirement.startswith("torch"):
            found.append(re.sub(">=", "==", requirement))
    return found


if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
    sys.stdout.write("\n".join(oldest(project, sys.argv[1:])) + "\n")
