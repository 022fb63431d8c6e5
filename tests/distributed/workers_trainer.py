"""Trainer in several processes: DDP, FSDP2 and ZeRO, and what a restart gives."""

import os
import signal
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

import momo_hf  # noqa: F401, makes the name valid and equips Trainer
from tests.distributed.workers import pretend, reset
from tests.distributed.workers_zero import ENVIRONMENT
from tests.toys import Points, TokenNet


class Config(PretrainedConfig):
    model_type = "toy"


class Model(PreTrainedModel):
    """The toy net as a transformers model, so that checkpoints and sharding work as for any other."""

    config_class = Config
    _no_split_modules = ["Linear"]

    def __init__(self, config):
        super().__init__(config)
        self.net = TokenNet()

    def get_input_embeddings(self):
        return self.net.first

    def forward(self, inputs, labels, num_items_in_batch=None, **kwargs):
        return self.net(inputs, labels, num_items_in_batch)


class InOrder(Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class KillAt(TrainerCallback):
    """Stops the process as a power cut would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


ZERO = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}
KINDS = {
    "plain": {},
    "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Linear"]}},
    **{f"zero{stage}": {"deepspeed": {**ZERO, "zero_optimization": {"stage": stage}}} for stage in (1, 2, 3)},
}


def train(folder, kind, accumulation=1, kill_at=None, resume=None, steps=9, shuffle=False, **options):
    """24 rows in global batches of 12, or accumulated in 10, 10, 4: then the last window of an epoch is incomplete."""
    reset()
    if kind != "plain":
        pretend(kind[:4] if kind.startswith("zero") else kind)
        options["accelerator_config"] = {"use_configured_state": True}
    world = int(os.environ["WORLD_SIZE"])
    args = TrainingArguments(
        output_dir=str(folder), optim="momo_adam", learning_rate=1.0, max_steps=steps, logging_steps=1, report_to="none",
        per_device_train_batch_size=(12 if accumulation == 1 else 10) // (world * accumulation), gradient_accumulation_steps=accumulation,
        use_cpu=kind == "plain", disable_tqdm=True, lr_scheduler_type="linear",
        save_strategy="steps", save_steps=2, **KINDS[kind], **options,
    )  # fmt: skip
    callbacks = [KillAt(kill_at)] if kill_at else []
    torch.manual_seed(0)
    trainer = (Trainer if shuffle else InOrder)(
        Model(Config()), args, train_dataset=Points(ragged=True), callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=resume)
    keys = ("step", "loss", "momo/effective_lr", "momo/loss_avg")
    return torch.tensor([[e[k] for k in keys] for e in trainer.state.log_history if "loss" in e], dtype=torch.float64)


def matrix(folder, kinds):
    return {
        f"{kind} {accumulation}": train(Path(folder) / f"{kind}{accumulation}", kind, accumulation)
        for kind in kinds.split(",")
        for accumulation in (1, 5)
    }


def run(folder, kind, kill_at="", resume=""):
    return train(folder, kind, kill_at=int(kill_at or 0), resume=resume or None, shuffle=True)


def resumed_and_whole(folder, kind, checkpoint):
    """A run that continues from a checkpoint, and one that was never interrupted, in one start of the processes."""
    return [
        train(Path(folder) / "resumed", kind, resume=checkpoint, shuffle=True),
        train(Path(folder) / "whole", kind, shuffle=True),
    ]


ENVIRONMENTS = {
    "plain": None,
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_USE_CPU": "false"},
    **dict.fromkeys(("zero1", "zero2", "zero3"), ENVIRONMENT),
}
