"""What a sweep file says: its grids, and what is wrong in it is named."""

import json
from pathlib import Path

import pytest
import yaml

from momo_hf.recipes.errors import InputError
from momo_hf.recipes.sweeps.config import default_lr, load_sweep
from momo_hf.recipes.sweeps.running import command


def test_defaults_are_those_of_the_classes():
    assert default_lr({"optim": "adamw_torch"}) == 1e-3 and default_lr({"optim": "momo_adam"}) == 1e-2


def test_an_optimizer_that_searches_is_given_no_learning_rate(sweep_file):
    optimizers = {"auto": {"optim": "momo_adam_auto", "learning_rates": []}, "adamw": {"optim": "adamw_torch"}}
    optimizers["momo"] = {"optim": "momo", "optim_args": "lb=0.5,lr=auto"}
    sweep = load_sweep(sweep_file, optimizers=optimizers)
    assert sweep.grids == {"auto": [1.0], "adamw": [0.001, 0.01, 1, 10], "momo": [1.0]}
    lines = {name: command(sweep, name, 1.0, 0, Path("out")) for name in optimizers}
    assert "--learning_rate=1.0" in lines["adamw"] and "--optim_args=lr=auto" in lines["auto"]
    assert any(word.startswith("--optim_args=lb=0.5,lr=auto") for word in lines["momo"])
    assert not any("learning_rate" in word for name in ("auto", "momo") for word in lines[name])
    with pytest.raises(InputError, match="must be empty where the optimizer searches"):
        load_sweep(sweep_file, optimizers={"auto": {"optim": "momo_adam_auto", "learning_rates": [0.1]}})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"optimisers": {}}, "sweep.yaml, line 7: unknown name 'optimisers'; did you mean 'optimizers'"),
        (
            {"learning_rates": 0.001},
            r"sweep.yaml, line 2: 'learning_rates' must be of the type list\[float\], got 0.001",
        ),
        ({"seeds": ["a"]}, r"'seeds' must be of the type list\[int\], got \['a'\]"),
        ({"workers": "two"}, "'workers' must be of the type int, got 'two'"),
        ({"optimizers": {"adamw": {"learning_rates": 0.1}}}, "`learning_rates` must be a list of positive .* got 0.1"),
        (
            {"optimizers": {"adamw": "adamw_torch"}},
            "'optimizers' must be of the type dict.* got {'adamw': 'adamw_torch'}",
        ),
        ({"learning_rates": [0.0]}, r"`learning_rates` must be a list of positive numbers.* got \[0.0\]"),
        ({"workers": 0}, "`workers` must be 1 or more, got 0"),
        ({"optimizers": {}}, "`optimizers` is empty: name at least one"),
        ({"seeds": []}, r"`seeds` must be a list of whole numbers from 0.* got \[\]"),
        ({"seeds": [-1]}, r"`seeds` must be .* got \[-1\]"),
        ({"direction": "up"}, "sweep.yaml: `direction` must be .* got 'up'"),
        ({"more_metrics": {"bleu": "up"}}, "sweep.yaml: `bleu` must be .* got 'up'"),
        ({"script": "nothing.py"}, "names nothing.py, which does not exist"),
    ],
)
def test_wrong_sweeps_are_named(sweep_file, change, message):
    sweep_file.write_text(yaml.safe_dump(yaml.safe_load(sweep_file.read_text()) | change))
    with pytest.raises(InputError, match=message):
        load_sweep(sweep_file)


@pytest.mark.parametrize("url", ["nonsense", "sqlite:////no-such-folder/a.db", "unknown://user:secret@host/db"])
def test_a_storage_that_cannot_be_opened_is_named(sweep_file, url):
    with pytest.raises(InputError, match="`storage` cannot be opened .*a URL that optuna knows") as error:
        load_sweep(sweep_file, storage=url).study("adamw")
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


def test_missing_and_double_names_are_named(sweep_file):
    text = sweep_file.read_text()
    sweep_file.write_text(text + "metric: other\n")
    with pytest.raises(InputError, match="'metric' is there twice"):
        load_sweep(sweep_file)
    sweep_file.write_text("metric: value\nlearning_rates: [1e-3]\n")
    with pytest.raises(InputError, match="sweep.yaml: needs script, config, output_dir, optimizers too"):
        load_sweep(sweep_file)


@pytest.mark.parametrize("path", sorted(Path("configs/sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_sweeps_of_the_repository_are_read(path):
    sweep = load_sweep(path)
    assert sweep.number_of_runs > 1 and json.dumps(sweep.arguments)
