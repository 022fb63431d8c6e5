"""The wings of the package: scripts -> recipes -> integrations -> optim, and no way back; and what is imported late."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

import momo_hf


PACKAGE = Path(momo_hf.__file__).parent
SCRIPTS = Path(__file__).parents[1] / "scripts"
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# What each part may import of the package besides itself. `momo_hf` is the public names, `compat` of use to all.
PARTS = {
    "momo_hf.compat": set(),
    "momo_hf.optim": {"momo_hf.compat"},
    "momo_hf.integrations": {"momo_hf.compat", "momo_hf.optim"},
    "momo_hf": {"momo_hf.integrations", "momo_hf.optim"},
    "momo_hf.__main__": {"momo_hf", "momo_hf.integrations"},
    "momo_hf.recipes": {"momo_hf", "momo_hf.compat", "momo_hf.integrations", "momo_hf.optim"},
}


# What scores and draws at the end of a run takes a second to import, so that no script does it at its start.
LATE = {"evaluate", "matplotlib", "sacrebleu", "sklearn"}
RUNS = ("run_translation", "run_image_classification", "run_recommendation", "train_diffusion", "sweep_lr", "find_lr")


def imports(path, late=True):
    """Every module that a file imports: at its top and, if they count, in functions and for type checkers."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree) if late else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: the tests of directions do not follow relative imports"
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                yield inside if inside in FILES else node.module


def part_of(module):
    parts = [part for part in PARTS if module == part or (part != "momo_hf" and module.startswith(f"{part}."))]
    assert parts, f"{module} is in no part of the package"
    return parts[0]


@pytest.mark.parametrize("module", FILES)
def test_arrows_point_one_way(module):
    own = part_of(module)
    for imported in imports(FILES[module]):
        top = imported.split(".")[0]
        assert top not in ("scripts", "tests"), imported
        if top == "momo_hf":
            assert part_of(imported) in PARTS[own] | {own}, imported
        elif own == "momo_hf.optim":
            # Triton comes with torch where it can be used; its kernels are imported there alone.
            assert top in ("torch", "triton") or top in sys.stdlib_module_names, imported


def test_there_are_no_circles():
    graph = {module: {name for name in imports(path) if name in FILES} for module, path in FILES.items()}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(FILES)


@pytest.mark.parametrize("script", RUNS)
def test_what_is_for_the_end_is_imported_late(script):
    seen, due = set(), [SCRIPTS / f"{script}.py"]
    while due:
        found = set(imports(due.pop(), late=False)) - seen
        seen |= found
        due += [FILES[module] for module in found if module in FILES]
    assert "momo_hf.recipes.errors" in seen
    assert not {module.split(".")[0] for module in seen} & LATE
