"""What users put around a model: adapters, groups with their own lr, compilation, checkpointing, averages, trl."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import momo_hf
from momo_hf import MomoAdam
from momo_hf.recipes.translation.bpe import train_bpe
from tests.toys import Net, Points


def language_model(seed=0):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=2, n_head=2, n_embd=16, vocab_size=64, n_positions=16, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
    )


def sentences(rows=32):
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, 64, (rows, 1), generator=generator)
    ids = (starts + torch.arange(12)) % 64
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def arguments(tmp_path, cls=TrainingArguments, **options):
    defaults = {
        "output_dir": str(tmp_path), "optim": "momo_adam", "learning_rate": 1e-2, "per_device_train_batch_size": 8,
        "max_steps": 30, "logging_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True,
        "disable_tqdm": True, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return cls(**{**defaults, **options})


def history(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_lora_trains_its_adapters_only(tmp_path):
    model = get_peft_model(language_model(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn"]))
    before = copy.deepcopy(dict(model.named_parameters()))
    trainer = Trainer(model, arguments(tmp_path), train_dataset=sentences())
    trainer.train()
    losses = history(trainer, "loss")
    assert losses[-1] < losses[0] and len(history(trainer, "momo/effective_lr")) == 30
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != ("lora_" in name), name
    assert len(trainer.optimizer.state) == sum("lora_" in name for name, _ in model.named_parameters())


def test_lora_plus_groups_keep_their_ratio():
    model = get_peft_model(language_model(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn"]))
    optimizer = create_loraplus_optimizer(model, MomoAdam, lr=1e-3, loraplus_lr_ratio=16)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    ids = torch.tensor(sentences()["input_ids"])
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        lrs = {group["lr"]: float(group["effective_lr"]) for group in optimizer.param_groups if group["params"]}
        assert set(lrs) == {1e-3, 1.6e-2}
        assert lrs[1.6e-2] == pytest.approx(16 * lrs[1e-3])
        assert momo_hf.momo_metrics(optimizer)["momo/effective_lr"] == pytest.approx(lrs[1.6e-2])
    assert losses[-1] < losses[0]


def loop(model, steps=8, change=lambda model: model, average=None):
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    data = Points()
    model, optimizer = accelerator.prepare(change(model), MomoAdam(model.parameters(), lr=1.0))
    taus = []
    for _ in range(steps):
        accelerator.backward(model(data.inputs, data.labels)["loss"])
        optimizer.step()
        optimizer.zero_grad()
        taus.append(float(optimizer.param_groups[0]["effective_lr"]))
        if average is not None:
            average.update_parameters(model)
    return taus


def test_compiled_models_take_the_same_steps():
    compiled = loop(Net(), change=lambda model: torch.compile(model, backend="aot_eager"))
    assert compiled == pytest.approx(loop(Net()), rel=1e-5)


def test_averaged_copies_take_no_part():
    model = Net()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    assert loop(model, average=average) == loop(Net())
    assert not torch.equal(average.module.first.weight, model.first.weight)


def test_gradient_checkpointing_takes_the_same_steps(tmp_path):
    runs = []
    for checkpointing in (False, True):
        args = arguments(tmp_path, gradient_checkpointing=checkpointing, max_steps=6)
        trainer = Trainer(language_model(), args, train_dataset=sentences())
        trainer.train()
        runs.append(history(trainer, "momo/effective_lr"))
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def fine_tuned(tmp_path, args):
    tokenizer = train_bpe(["a b c d e f g h"] * 8, 40, 16)
    texts = Dataset.from_dict({"text": ["a b c d", "e f g h", "b c d e", "d e f g"] * 4})
    trainer = SFTTrainer(language_model(), args, train_dataset=texts, processing_class=tokenizer)
    trainer.train()
    return trainer


def test_trl_takes_the_name(tmp_path):
    trainer = fine_tuned(tmp_path, arguments(tmp_path, SFTConfig, max_length=8, max_steps=10))
    losses = history(trainer, "loss")
    assert losses[-1] < losses[0] and len(history(trainer, "momo/effective_lr")) == 10


@pytest.mark.parametrize("cls", [SFTConfig, TrainingArguments])
def test_trl_leaves_the_learning_rate_alone(cls, tmp_path):
    """SFTConfig has a default of its own, and SFTTrainer copies other arguments into one."""
    options = {"use_cpu": True, "max_steps": 80, "logging_steps": 1, "report_to": "none", "save_strategy": "no"}
    trainer = fine_tuned(tmp_path, cls(str(tmp_path), optim="momo_adam_auto", **options))
    search, losses = trainer.optimizer.search, history(trainer, "loss")
    assert search.cap > 1e-4 and losses[-1] < 0.9 * losses[0]
