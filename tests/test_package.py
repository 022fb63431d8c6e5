"""What an installation brings, and what importing the package brings with it."""

import importlib.metadata
import json
import pkgutil
import sys
from pathlib import Path

import pytest
import yaml

import momo_hf
from tests.processes.start import run


ROOT = Path(__file__).parents[1]


# Runs every code in a fork that has nothing of ours, but what takes long to import. Prints JSON: its output, None if it failed.
IN_FORKS = """
import gc, importlib, json, os, sys, tempfile

def load(name):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # not everybody has all packages of others
        if error.name.split(".")[0] == "momo_hf":
            raise

gc.disable()
outputs = []
for others, codes in json.loads(sys.argv[1]):
    for name in others:
        load(name)
    assert "momo_hf" not in sys.modules
    gc.freeze()  # pages that nobody writes stay shared
    for code in codes:
        with tempfile.TemporaryFile("w+") as file:
            if (child := os.fork()) == 0:
                os.dup2(file.fileno(), 1)
                exec(code, {"load": load})
                sys.stdout.flush()
                os._exit(0)
            failed = os.waitpid(child, 0)[1]
            file.seek(0)
            outputs.append(None if failed else file.read())
print(json.dumps(outputs))
"""
# accelerate and transformers are not there where momo_hf.integrations begins: importing them has us called back.
BEFORE = [
    "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor",
    "numpy", "datasets", "huggingface_hub", "matplotlib.figure", "scipy.stats", "sklearn.metrics",
]  # fmt: skip
AFTER = ["accelerate", "transformers.trainer", "diffusers", "evaluate", "optuna", "sacrebleu"]
FIRST = [
    "import importlib.util, momo_hf; importlib.util.find_spec('accelerate'); import accelerate",
    "import momo_hf; from transformers import Seq2SeqTrainer; import accelerate",
    "import accelerate; from transformers import Trainer; import momo_hf",
    "from momo_hf import MomoSeq2SeqTrainer; import accelerate",
    "from momo_hf import label_smoothing_bound; import accelerate",
    "import momo_hf.integrations.model_card; import accelerate",
]


def python(code, *arguments, **options):
    result = run("-c", code, *arguments, cold=True, **options)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def outputs():
    """What every code printed."""
    names = [module.name for module in pkgutil.walk_packages(momo_hf.__path__, "momo_hf.")]
    recipes = [name for name in names if name.startswith("momo_hf.recipes")]
    early = [*map(wired, FIRST), NO_EFFECT, *(f"load({name!r})" for name in sorted({*names} - {*recipes}))]
    stages = [(BEFORE, early), (AFTER, [f"load({name!r})" for name in recipes])]
    single = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}  # pyarrow's thread would not survive the forks
    shown = python(IN_FORKS, json.dumps(stages), environment=single)
    return dict(zip([*early, *stages[1][1]], json.loads(shown), strict=True))


def test_the_optimizers_import_torch_and_nothing_else():
    code = "import sys, json, torch; before = set(sys.modules); import momo_hf.optim"
    new = set(json.loads(python(f"{code}; print(json.dumps(sorted(set(sys.modules) - before)))")))
    assert "momo_hf.optim.momo_adam" in new
    others = {name for name in new if name.split(".")[0] not in sys.stdlib_module_names | {"momo_hf"}}
    assert not others


def test_the_optimizers_work_where_transformers_and_accelerate_are_missing():
    shown = python("""
import sys
sys.modules.update({"transformers": None, "accelerate": None})
import torch
from momo_hf import MomoAdam
from momo_hf.optim import Momo

for method in (Momo, MomoAdam):
    x = torch.nn.Parameter(torch.ones(3))
    optimizer = method([x], lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        loss = x.square().sum()
        loss.backward()
        optimizer.step(loss=loss)
    print(loss.item() < 3)
try:
    from momo_hf import MomoTrainer
except ImportError as error:
    print(error.name)
""")
    assert shown.split() == ["True", "True", "transformers"]


def wired(code):
    return f"""
import sys
assert not {{"accelerate", "transformers"}} & set(sys.modules)
{code}
from transformers import Trainer, TrainingArguments
args = TrainingArguments("out", optim="momo_adam", use_cpu=True)
print(Trainer.get_optimizer_cls_and_kwargs(args)[0].__name__, accelerate.Accelerator.backward.wrapper)
"""


@pytest.mark.parametrize("code", FIRST)
def test_names_and_wiring_are_there_whatever_is_imported_first(outputs, code):
    assert outputs[wired(code)].split() == ["MomoAdam", "momo_hf.integrations.accelerate._backward"]


def test_every_module_can_be_imported_first(outputs):
    imports = {code: shown for code, shown in outputs.items() if code.startswith("load(")}
    assert {"load('momo_hf.optim.momo_adam')", "load('momo_hf.recipes.loop')"} < imports.keys()
    assert not [code for code, shown in imports.items() if shown is None]


NO_EFFECT = """
import importlib, pkgutil, sys
import momo_hf.integrations

sys.meta_path.remove(momo_hf.integrations._WATCH)
for module in pkgutil.iter_modules(momo_hf.integrations.__path__, "momo_hf.integrations."):
    importlib.import_module(module.name)

from accelerate import Accelerator
from transformers import Trainer
from transformers.training_args import OptimizerNames

def wired():
    functions = (Accelerator.backward, Trainer.create_optimizer, Trainer.get_optimizer_cls_and_kwargs)
    return "momo" in list(OptimizerNames), *(hasattr(function, "wrapper") for function in functions)

print(*wired())
momo_hf.integrations.install()
first = Accelerator.backward
momo_hf.integrations.install()
print(*wired(), Accelerator.backward is first, sys.meta_path.count(momo_hf.integrations._WATCH))
"""


def test_modules_have_no_effect_until_they_are_installed(outputs):
    assert outputs[NO_EFFECT].splitlines() == ["False False False False", "True True True True True 1"]


def test_everything_public_can_be_had():
    assert all(getattr(momo_hf, name).__name__ == name for name in momo_hf.__all__)
    with pytest.raises(AttributeError, match="'momo_hf' has no attribute 'Mommo'"):
        momo_hf.Mommo  # noqa: B018


def test_the_version_is_one():
    assert importlib.metadata.version("momo-hf") == momo_hf.__version__
    assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]) == momo_hf.__version__
    number, _, development = momo_hf.__version__.partition(".dev")
    heading = (ROOT / "CHANGELOG.md").read_text().partition("\n## ")[2].splitlines()[0]
    assert heading.startswith(f"{number}, ") and ("not released yet" in heading) == bool(development)
    assert (Path(momo_hf.__file__).parent / "py.typed").is_file()
