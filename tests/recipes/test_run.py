"""Configs: the values of YAML 1.2, and one error that names file, line and fix for what is wrong."""

from dataclasses import dataclass, field

import pytest
from datasets import are_progress_bars_disabled, enable_progress_bars
from transformers import TrainingArguments

from momo_hf.recipes.config_file import read_config
from momo_hf.recipes.errors import InputError
from momo_hf.recipes.run import parse_run


@dataclass
class Arguments:
    dataset: str = field()
    sizes: list[int] = field(default_factory=lambda: [1])
    name: str | None = None


def parse(tmp_path, text, *argv):
    (tmp_path / "run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return parse_run((Arguments, TrainingArguments), [str(tmp_path / "run.yaml"), *argv])


def test_values(tmp_path):
    text = (
        "\ufeffdataset: 007\nsizes: 64\nname: 2026-11-25\nlearning_rate: 1e-3\nsave_strategy: no\nbf16: False\n"
        "lr_scheduler_kwargs: {num_cycles: 5e-1, power: 2}\nweight_decay: # the default\nreport_to: none\n"
    )
    run, args = parse(tmp_path, text, "--seed", "3", f"--output_dir={tmp_path}")
    assert run == Arguments("007", [64], "2026-11-25")
    assert (args.learning_rate, args.save_strategy, args.bf16, args.seed) == (0.001, "no", False, 3)
    assert args.lr_scheduler_kwargs == {"num_cycles": 0.5, "power": 2} and args.weight_decay == 0.0
    run, args = parse(tmp_path, text, "--sizes", "2", "3", "--learning_rate", "1")
    assert run.sizes == [2, 3] and args.learning_rate == 1.0


def test_yaml_is_read_by_version_1_2(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "a: [1e-3, .5, -2., 1E+4, -3, 0, .inf]\nb: [yes, 1:30, 010, 1_000, 1.2.3, '1']\nc: [true, False, ~]\n"
    )
    values, lines = read_config(path)
    assert values["a"] == [0.001, 0.5, -2.0, 10000.0, -3, 0, float("inf")] and type(values["a"][4]) is int
    assert values["b"] == ["yes", "1:30", "010", "1_000", "1.2.3", "1"]
    assert values["c"] == [True, False, None] and lines == {"a": 1, "b": 2, "c": 3}


@pytest.mark.parametrize(
    "text, message",
    [
        ("- dataset: x\n", "run.yaml, line 1: a config holds lines of the form `name: value`, but this is a list"),
        ("\n\nhello\n", "run.yaml, line 3: a config holds .* but this is a single value"),
        ("dataset: x\nseed: 1\nseed: 2\n", "run.yaml, line 3: 'seed' is there twice, first in line 2; remove one"),
        ("dataset: x\nlearning_rat: 1\n", "run.yaml, line 2: unknown name 'learning_rat'; did you mean 'learning_rate'?"),
        ("dataset: x\nlearning_rate: [1, 2]\n", r"run.yaml, line 2: 'learning_rate' takes one value, got the list \[1, 2\]"),
        ("dataset: x\nlearning_rate: fast\n", "run.yaml, line 2: .*learning_rate.*invalid float value: 'fast'"),
        ("dataset: x\nsizes: [1, b]\n", "run.yaml, line 2: .*sizes.*invalid int value: 'b'"),
        ("dataset: x\noptim: adamm\n", "run.yaml, line 2: .*optim.*invalid choice: 'adamm'"),
        ("dataset: x\nlr_scheduler_kwargs: {a: 1, a: 2}\n", "run.yaml, line 2: 'a' is there twice"),
        ("dataset: x\nseed: [1\n", "run.yaml, line 2: while parsing a flow sequence"),
        ("seed: 1\n", "run.yaml: the following arguments are required: --dataset"),
        ("dataset: x\nsave_strategy: steps\neval_strategy: epoch\nload_best_model_at_end: true\n", "run.yaml: .*load_best_model_at_end"),
        (b"dataset: x\nname: caf\xe9\n", "run.yaml, line 2: byte 0xe9 at position 10 is not UTF-8"),
        ("", "run.yaml: the file is empty"),
    ],
)  # fmt: skip
def test_wrong_configs(tmp_path, text, message):
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        parse(tmp_path, text)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--lerning_rate=1"], "^on the command line: unknown name 'lerning_rate'; did you mean 'learning_rate'"),
        (["--learning_rate", "x"], "^argument --learning_rate.*invalid float value: 'x'"),
        (["more"], "^on the command line: unknown name 'more'"),
    ],
)
def test_wrong_command_lines(tmp_path, argv, message):
    with pytest.raises(InputError, match=message):
        parse(tmp_path, "dataset: x\nlearning_rate: 1\n", *argv)


def test_files_that_are_no_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"config file none.yaml does not exist .looked for {tmp_path}/none.yaml"):
        parse_run((Arguments,), ["none.yaml"])
    with pytest.raises(InputError, match="train.json: the first argument must be a config"):
        parse_run((Arguments,), ["train.json"])


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text(
        "dataset: ~/data\nname: a~b\noutput_dir: ~/out\nresume_from_checkpoint: ~/old\n"
    )
    run, args = parse_run((Arguments, TrainingArguments), ["~/run.yaml"])
    assert (run.dataset, run.name) == (f"{tmp_path}/data", "a~b")
    assert (args.output_dir, args.resume_from_checkpoint) == (f"{tmp_path}/out", f"{tmp_path}/old")


def test_one_argument_turns_all_bars_off(tmp_path):
    try:
        parse(tmp_path, "dataset: x\n")
        assert not are_progress_bars_disabled()
        parse(tmp_path, "dataset: x\ndisable_tqdm: true\n")
        assert are_progress_bars_disabled()
    finally:
        enable_progress_bars()
