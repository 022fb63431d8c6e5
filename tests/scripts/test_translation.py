"""scripts/run_translation.py as a user runs it, at a tiny size."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import pipeline

import momo_hf.recipes.translation.pipeline  # noqa: F401
from momo_hf.recipes.translation.data import load_translation
from tests.scripts.conftest import documented


TINY = [
    "--max_train_samples", 64, "--max_eval_samples", 4, "--per_device_train_batch_size", 8, "--vocab_size", 300,
    "--d_model", 16, "--layers", 1, "--ffn_dim", 16, "--attention_heads", 2, "--generation_max_length", 12,
    "--generation_num_beams", 2,
    "--max_length", 96, "--logging_steps", 1, "--disable_tqdm", "True", "--use_cpu", "True",
    "--dataloader_pin_memory", "False",
]  # fmt: skip
SCRIPT = ["scripts/run_translation.py", "configs/translation/demo.yaml", *TINY]


def results(folder):
    return json.loads((Path(folder) / "results.json").read_text())


def test_train_resume_and_use(run_script, tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    ended = run_script(*SCRIPT, "--output_dir", once, "--num_train_epochs", 2, "--save_total_limit", 2)
    assert "BLEU" in ended.stdout and ended.stdout.count("\n> ") == 4
    assert "missing keys" not in ended.stderr

    found = results(once)
    assert {"test_bleu", "test_chrf", "eval_loss", "train_loss"} <= set(found["metrics"])
    assert found["arguments"]["optim"] == "momo_adam" and found["arguments"]["dataset"] == "demo"
    assert found["versions"]["torch"] and found["seconds"] > 0 and len(found["samples"]) == 4
    assert any(once.rglob("events.out.tfevents*"))
    # Sources come from the data and references from the labels that the predictions belong to: they must match.
    pairs = {row["source"]: row["target"] for row in load_translation("demo", "de", "en")["test"]}
    assert all(pairs[sample["source"]] == sample["reference"] for sample in found["samples"])

    # The second epoch again, from the checkpoint of the first: the same losses and step sizes.
    shutil.copytree(once / "checkpoint-8", twice / "checkpoint-8")
    run_script(
        *SCRIPT, "--output_dir", twice, "--num_train_epochs", 2, "--resume_from_checkpoint", "True",
        "--save_total_limit", 2,
    )  # fmt: skip

    def history(folder):
        state = json.loads((folder / "checkpoint-16" / "trainer_state.json").read_text())
        return [(e["step"], e["loss"], e["momo/effective_lr"]) for e in state["log_history"] if "loss" in e]

    assert len(history(once)) == 16 and history(once) == history(twice)

    # Loaded as configs/README.md says, it translates as the run did, although nobody says how long or with how many beams.
    texts = [sample["source"] for sample in found["samples"]]
    code = documented("AutoModelForSeq2SeqLM").replace("outputs/translation-demo", str(once))
    namespace = {}
    exec(code.replace('["Wir sehen uns am Dienstag, 3. März 2026."]', repr(texts)), namespace)
    translations = [sample["translation"] for sample in found["samples"]]
    assert [text.strip() for text in namespace["translations"]] == translations
    config = namespace["model"].generation_config
    assert (config.max_length, config.num_beams) == (12, 2)
    translate = pipeline("translation", str(once))
    alone = namespace["model"].generate(**namespace["tokenizer"](texts[0], return_tensors="pt"))
    expected = namespace["tokenizer"].decode(alone[0], skip_special_tokens=True)
    assert translate(texts[0]) == [{"translation_text": expected}]

    # Fine-tune what was just trained.
    again = tmp_path / "again"
    options = ["--model_name_or_path", once, "--max_steps", 2, "--eval_strategy", "no", "--save_strategy", "no"]
    run_script(
        *SCRIPT, *options, "--output_dir", again, "--load_best_model_at_end", "False", "--learning_rate", "1e-4"
    )
    assert results(again)["arguments"]["model_name_or_path"] == str(once)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["configs/translation/none.yaml"], "config file configs/translation/none.yaml does not exist"),
        (["configs/translation/demo.yaml", "--optim", "adamm"], "invalid choice: 'adamm'"),
        (["configs/translation/demo.yaml", "--dataset", "./nowhere"], "'./nowhere' does not exist"),
        (["configs/translation/demo.yaml", "--lerning_rate", "1"], "did you mean 'learning_rate'?"),
    ],
)
def test_wrong_arguments_are_named(run_script, arguments, message, tmp_path):
    result = run_script("scripts/run_translation.py", *arguments, check=False)
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 2 and last.startswith("run_translation.py: error: ") and message in last
    assert "Traceback" not in result.stderr
