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


# Every module of ours is imported by a fork that has none of them, but what takes long to import.
IMPORT_EACH = """
import importlib, json, os, sys

def load(name):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # not everybody has all packages of others
        if error.name.split(".")[0] == "momo_hf":
            raise

failed = []
for others, ours in json.loads(sys.argv[1]):
    for name in others:
        load(name)
    for name in ours:
        if (child := os.fork()) == 0:
            load(name)
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            failed.append(name)
sys.exit(failed or 0)
"""


def python(code, *arguments, **options):
    result = run("-c", code, *arguments, cold=True, **options)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


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


@pytest.mark.parametrize(
    "code",
    [
        "import importlib.util, momo_hf; importlib.util.find_spec('accelerate'); import accelerate",
        "import momo_hf; from transformers import Seq2SeqTrainer; import accelerate",
        "import accelerate; from transformers import Trainer; import momo_hf",
        "from momo_hf import MomoSeq2SeqTrainer; import accelerate",
        "from momo_hf import label_smoothing_bound; import accelerate",
        "import momo_hf.integrations.model_card; import accelerate",
    ],
)
def test_names_and_wiring_are_there_whatever_is_imported_first(code):
    shown = python(f"""
{code}
from transformers import Trainer, TrainingArguments
args = TrainingArguments("out", optim="momo_adam", use_cpu=True)
print(Trainer.get_optimizer_cls_and_kwargs(args)[0].__name__, accelerate.Accelerator.backward.wrapper)
""")
    assert shown.split() == ["MomoAdam", "momo_hf.integrations.accelerate._backward"]


def test_every_module_can_be_imported_first():
    names = [module.name for module in pkgutil.walk_packages(momo_hf.__path__, "momo_hf.")]
    recipes = [name for name in names if name.startswith("momo_hf.recipes")]
    torch = ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor"]
    # accelerate and transformers are not there where momo_hf.integrations begins: importing them has us called back.
    before = ["numpy", "datasets", "huggingface_hub", "matplotlib.figure", "scipy.stats", "sklearn.metrics"]
    after = ["accelerate", "transformers.trainer", "diffusers", "evaluate", "optuna", "sacrebleu"]
    stages = [([*torch, *before], sorted({*names} - {*recipes})), (after, recipes)]
    assert all(ours for _, ours in stages)
    single = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}  # pyarrow's thread would not survive the forks
    python(IMPORT_EACH, json.dumps(stages), environment=single)


def test_modules_have_no_effect_until_they_are_installed():
    shown = python("""
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
""")
    assert shown.splitlines() == ["False False False False", "True True True True True 1"]


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
