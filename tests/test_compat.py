"""What differs between versions must not show: the same on every line of transformers."""

import pytest
from transformers import TrainingArguments

from momo_hf.recipes.run import parse_run


@pytest.mark.parametrize(
    "in_file, on_line, steps",
    [
        ("0.1", [], 10),
        ("7", [], 7),
        ("0.1", ["--warmup_steps", "5"], 5),
        ("0.1", ["--warmup_steps=0"], 0),
        ("7", ["--warmup_steps", "0"], 0),
        ("7", ["--warmup_steps", "0.25", "--seed", "3"], 25),
    ],
)
def test_a_warmup_is_a_number_of_steps_or_a_share(tmp_path, in_file, on_line, steps):
    (tmp_path / "a.yaml").write_text(f"output_dir: {tmp_path}\nuse_cpu: true\nwarmup_steps: {in_file}\n")
    (args,) = parse_run((TrainingArguments,), [str(tmp_path / "a.yaml"), *on_line])
    assert args.get_warmup_steps(100) == steps
