"""scripts/run_translation.py as a user runs it, at a tiny size."""

import json
import re
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, pipeline

import momo_hf.recipes.translation.pipeline  # noqa: F401
from momo_hf.recipes.translation.cldr import LANGUAGE, TEMPLATES
from momo_hf.recipes.translation.data import load_translation
from tests.scripts.conftest import ROOT, documented


TINY = [
    "--max_train_samples", 64, "--max_eval_samples", 4, "--per_device_train_batch_size", 8, "--vocab_size", 300,
    "--d_model", 16, "--layers", 1, "--ffn_dim", 16, "--attention_heads", 2, "--generation_max_length", 12,
    "--generation_num_beams", 2,
    "--max_length", 96, "--logging_steps", 1, "--disable_tqdm", "True", "--use_cpu", "True",
    "--dataloader_pin_memory", "False", "--optim", "momo_adam", "--learning_rate", 1e-3,
]  # fmt: skip
SCRIPT = ["scripts/run_translation.py", "configs/translation/demo.yaml", *TINY]


def results(folder):
    return json.loads((Path(folder) / "results.json").read_text())


def test_train_resume_and_use(run_script, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    once, twice = tmp_path / "once", tmp_path / "twice"
    ended = run_script(*SCRIPT, "--output_dir", once, "--num_train_epochs", 2, "--save_total_limit", 2, cold=True)
    assert "BLEU" in ended.stdout and ended.stdout.count("\n> ") == 4
    assert LANGUAGE in ended.stderr and ended.stdout.endswith(f"{LANGUAGE}\n")  # at the start, and at the end
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

    # Loaded as the README says, it translates as the run did, although nobody says how long or with how many beams.
    texts = [sample["source"] for sample in found["samples"]]
    code = documented("batch_decode").replace("outputs/translation-demo", str(once))
    namespace = {}
    exec(re.sub(r"sentences = \[.*?\]", f"sentences = {texts!r}", code, flags=re.DOTALL), namespace)
    translations = [sample["translation"] for sample in found["samples"]]
    assert [text.strip() for text in namespace["translations"]] == translations
    config = namespace["model"].generation_config
    assert (config.max_length, config.num_beams) == (12, 2)
    translate = pipeline("translation", str(once))
    alone = namespace["model"].generate(**namespace["tokenizer"](texts[0], return_tensors="pt"))
    expected = namespace["tokenizer"].decode(alone[0], skip_special_tokens=True)
    assert translate(texts[0]) == [{"translation_text": expected}]

    # Fine-tune what was just trained: by the script and its config, and by the code that configs/README.md shows.
    data, again = tmp_path / "data", tmp_path / "again"
    data.mkdir()
    rows = [{"source": text, "target": target} for text, target in list(pairs.items())[:8]]
    for split in ("train", "validation"):
        lines = [json.dumps({"de": row["source"], "en": row["target"]}) for row in rows]
        (data / f"{split}.jsonl").write_text("\n".join(lines))
    ended = run_script(
        "scripts/run_translation.py", "configs/translation/finetune.yaml", "--model_name_or_path", once, "--dataset", data,
        "--output_dir", again, "--max_steps", 2, "--use_cpu", "True", "--report_to", "none", "--disable_tqdm", "True",
    )  # fmt: skip
    assert results(again)["arguments"]["model_name_or_path"] == str(once)
    assert LANGUAGE not in ended.stdout + ended.stderr
    assert "max_length=128 is more than the 96 tokens the model takes" in ended.stderr

    (data / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code = documented("DataCollatorForSeq2Seq").replace("Helsinki-NLP/opus-mt-de-en", str(once))
    code = code.replace("pairs.jsonl", str(data / "pairs.jsonl")).replace("outputs/own", str(tmp_path / "own"))
    namespace = {}
    exec(
        code.replace("num_train_epochs=3", "num_train_epochs=3, use_cpu=True, report_to=[], logging_steps=1"),
        namespace,
    )
    losses = [entry["loss"] for entry in namespace["trainer"].state.log_history if "loss" in entry]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert type(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "own")) is type(namespace["model"])
    assert AutoTokenizer.from_pretrained(tmp_path / "own")(texts[0]) == namespace["tokenizer"](texts[0])


def test_the_readme_shows_what_the_demo_can_translate():
    patterns = [re.sub(r"\\{\w+\\}", ".+", re.escape(german)) for german, _ in TEMPLATES]
    shown = re.findall(r'"(.+)",\n', documented("batch_decode"))
    assert len(shown) == 3 and all(any(re.fullmatch(p, text) for p in patterns) for text in shown)
    assert not any(re.fullmatch(p, "Guten Morgen, wie geht es dir?") for p in patterns)
    assert f"{len(TEMPLATES)} patterns" in (ROOT / "README.md").read_text("utf-8")


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
