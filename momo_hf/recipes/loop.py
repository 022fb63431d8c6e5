"""The bookkeeping of a training loop on accelerate: the arguments are the Trainer's, the loop stays in the script."""

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, ProjectConfiguration, set_seed
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import Trainer, TrainingArguments, get_scheduler

from momo_hf.integrations.accelerate import momo_metrics
from momo_hf.integrations.bars import log_above_bars
from momo_hf.integrations.groups import by_method
from momo_hf.integrations.search_report import SearchReport
from momo_hf.integrations.weights import unwrap_optimizer
from momo_hf.optim import MomoMuon
from momo_hf.recipes.errors import InputError
from momo_hf.recipes.outputs import RunArguments, folder_of, remove_old_run, rotate, whole_folder, write_json


logger = logging.getLogger(__name__)

STATE = "run.json"  # of a run, in its checkpoints


def make_accelerator(args: TrainingArguments) -> Accelerator:
    """An Accelerator with the precision, accumulation, trackers and folder of the arguments.

    Without `bf16` and `fp16` the precision is that of `accelerate launch`.
    """
    accelerator = Accelerator(
        mixed_precision="bf16" if args.bf16 else "fp16" if args.fp16 else None,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=args.gradient_accumulation_steps),
        log_with=list(args.report_to or ()),
        project_config=ProjectConfiguration(str(folder_of(args))),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        cpu=args.use_cpu,
    )
    if accelerator.state.deepspeed_plugin is not None:
        # DeepSpeed clips inside its step, by a value that accelerate would set to 1.
        accelerator.state.deepspeed_plugin.fill_match(
            "gradient_clipping", must_match=False, gradient_clipping=args.max_grad_norm
        )
    level = logging.INFO if accelerator.is_main_process else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s")
    set_seed(args.seed)  # the same model everywhere; `Loop` makes the noise differ
    return accelerator


def make_optimizer(args: TrainingArguments, model: nn.Module, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer that the Trainer would make of `optim`, `optim_args`, `learning_rate` and the like, for groups of the
    parameters of a model.
    """
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    if issubclass(cls, MomoMuon):
        groups = by_method(model, groups)
    return cls([{"weight_decay": args.weight_decay, **group} for group in groups], **kwargs)


def make_scheduler(
    args: TrainingArguments, optimizer: torch.optim.Optimizer, steps: int, accelerator: Accelerator
) -> LRScheduler:
    """The schedule of the arguments; accelerate advances it once per process at every step."""
    processes, options = accelerator.num_processes, args.lr_scheduler_kwargs
    return get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(steps) * processes,
        num_training_steps=steps * processes,
        scheduler_specific_kwargs=options if isinstance(options, dict) else {},  # a text was read by the arguments
    )


def number_of_steps(args: TrainingArguments, loader: DataLoader, accelerator: Accelerator) -> int:
    """Optimizer steps of the run, from `max_steps` or `num_train_epochs` and a loader that is not yet prepared."""
    if len(loader) == 0:
        raise InputError(
            f"per_device_train_batch_size={args.per_device_train_batch_size} leaves no whole batch of the "
            "training images: take a smaller one."
        )
    if args.max_steps > 0:
        return args.max_steps
    batches = math.ceil(len(loader) / accelerator.num_processes)
    return math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))


class Loop:
    """Steps, epochs, logs and checkpoints of one run; and what a search for the cap has seen, in `search.json` and `.png`.

    Args:
        args: of the Trainer; `logging_steps`, `eval_steps`, `save_steps` count optimizer steps, and the strategies
            "epoch" and "no" work as there.
        accelerator: from `make_accelerator`.
        optimizer: prepared.
        loader: prepared.
        steps: from `number_of_steps`.
        ema: averaged weights, or None; not used where the optimizer averages the weights itself.
    """

    def __init__(
        self,
        args: RunArguments,
        accelerator: Accelerator,
        optimizer: Any,
        loader: DataLoaderShard | DataLoaderDispatcher,
        steps: int,
        ema: EMAModel | None = None,
    ) -> None:
        self.args, self.accelerator, self.optimizer, self.loader, self.ema = args, accelerator, optimizer, loader, ema
        self.step, self.steps = 0, steps
        self._momo = unwrap_optimizer(optimizer)
        if ema is not None and self._momo is not None and self._momo.averages:
            logger.info("The optimizer averages the weights itself, so that no EMA is needed, and none is kept.")
            self.ema = None
        self.history: list[dict[str, float]] = []
        self._steps_per_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps)
        self._losses: list[Tensor] = []
        if not args.resume_from_checkpoint:
            remove_old_run(args)
        if args.report_to:
            accelerator.init_trackers("run")
        optimizer.train()  # schedule-free optimizers ask for it
        set_seed(args.seed, device_specific=True)
        if args.resume_from_checkpoint:
            self._resume(Path(args.resume_from_checkpoint))
        log_above_bars()
        self._report: SearchReport | None = None
        if self._momo is not None:
            self._report = SearchReport(self._momo, folder_of(args), accelerator.is_main_process, steps - self.step)
        self._bar = tqdm(
            total=steps, initial=self.step, disable=args.disable_tqdm or not accelerator.is_local_main_process
        )

    def batches(self) -> Iterator[Any]:
        """Batches, epoch after epoch, until the steps are done; after a resume from where the checkpoint was made."""
        epoch, done = divmod(self.step, self._steps_per_epoch)
        rng_state: Tensor | None = torch.get_rng_state()
        while self.step < self.steps:
            self.loader.set_epoch(epoch)
            skipped = done * self.args.gradient_accumulation_steps
            loader = self.accelerator.skip_first_batches(self.loader, skipped) if skipped else self.loader
            for batch in loader:
                if rng_state is not None:
                    # To start, a loader draws a seed of its own; after a resume that would shift all that is drawn later.
                    torch.set_rng_state(rng_state)
                    rng_state = None
                yield batch
                if self.step >= self.steps:
                    return
            epoch, done = epoch + 1, 0

    def after_backward(self, loss: Tensor) -> bool:
        """Count the micro-batch; True where it was the last one of a step.

        Args:
            loss: of the micro-batch, as it was backpropagated.
        """
        self._losses.append(loss.detach())
        if not self.accelerator.sync_gradients:
            return False
        self.step += 1
        self._bar.update()
        if self.ema is not None and not (self._momo is not None and self._momo.searching):
            self.ema.step(self._parameters())
        if self._report is not None:
            self._report.after_step()
            if self.step == self.steps:
                self._report.at_end()
        if self.step % self.args.logging_steps == 0 or self.step == 1:
            mean = self.accelerator.reduce(torch.stack(self._losses).float().mean(), "mean").item()
            metrics = momo_metrics(self.optimizer)
            lr = max(group["lr"] for group in self.optimizer.param_groups)
            lr = metrics.get("momo/cap", lr)  # what counted of the schedule's number
            self.log({"loss": mean, "learning_rate": float(lr), **metrics})
            self._losses = []
        return True

    def log(self, values: dict[str, float]) -> None:
        """Note values of this step in the history, the trackers and the log."""
        self.history.append({"step": self.step, **values})
        self.accelerator.log(values, step=self.step)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        logger.info(f"step {self.step} of {self.steps}: {shown}")
        if not all(math.isfinite(value) for value in values.values()):
            logger.warning(f"Step {self.step}: a value is not finite; the run has probably diverged.")

    def logged(self, name: str) -> list[float]:
        """All values of one name in the history, which outlives a resume."""
        return [entry[name] for entry in self.history if name in entry]

    def is_due(self, what: str) -> bool:
        """Whether `"eval"` or `"save"` is to be done after this step; both are at the end, unless turned off."""
        strategy = str(getattr(self.args, f"{what}_strategy").value)
        every = self._steps_per_epoch if strategy == "epoch" else int(getattr(self.args, f"{what}_steps") or 1)
        return strategy != "no" and (self.step % every == 0 or self.step == self.steps)

    def save(self) -> Path:
        """Write `checkpoint-STEP` and remove the oldest ones beyond `save_total_limit`."""
        folder = folder_of(self.args) / f"checkpoint-{self.step}"
        state = {"step": self.step, "history": self.history, "processes": self.accelerator.num_processes}
        with whole_folder(folder, self.args.should_save) as beside:
            self.accelerator.save_state(str(beside))
            if self.ema is not None:
                state["ema"] = self.ema.state_dict()
                averages = {str(i): _local(p).contiguous() for i, p in enumerate(state["ema"].pop("shadow_params"))}
                # One file per process: under FSDP each one averages its own shards.
                save_file(averages, beside / f"ema_{self.accelerator.process_index}.safetensors")
            if self.args.should_save:
                write_json(beside / STATE, state)
        if self.args.should_save:
            rotate(folder.parent, self.args.save_total_limit)
        return folder

    def _resume(self, checkpoint: Path) -> None:
        if not (checkpoint / STATE).is_file():
            raise InputError(f"resume_from_checkpoint={checkpoint} is no checkpoint of this script: no {STATE} in it.")
        state = json.loads((checkpoint / STATE).read_text("utf-8"))
        if state["processes"] != self.accelerator.num_processes:
            raise InputError(
                f"{checkpoint} was made by {state['processes']} processes, and this run has "
                f"{self.accelerator.num_processes}: schedule, batches and random numbers are counted per process. Start "
                f"{state['processes']} to go on."
            )
        if self.ema is not None and "ema" not in state:
            raise InputError(f"{checkpoint} was made without averaged weights; go on with --ema_decay 0.")
        self.accelerator.load_state(str(checkpoint))
        self.step, self.history = state["step"], state["history"]
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
            averages = load_file(checkpoint / f"ema_{self.accelerator.process_index}.safetensors")
            for i, average in enumerate(self.ema.shadow_params):
                _local(average).copy_(averages[str(i)])
        logger.info(f"Resumed {checkpoint} at step {self.step}.")

    def _parameters(self) -> list[Tensor]:
        for module in (module for model in self.accelerator._models for module in model.modules()):
            if isinstance(module, FSDPModule):
                module.reshard()  # after a forward pass without a backward pass it still holds whole parameters
        return [p for model in self.accelerator._models for p in model.parameters()]

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Within it the models are in eval mode, with the averaged weights if there are any."""
        models = self.accelerator._models
        self.optimizer.eval()  # schedule-free optimizers exchange the weights here
        for model in models:
            model.eval()
        if self.ema is not None:
            self.ema.store(self._parameters())
            self.ema.copy_to(self._parameters())
        try:
            with torch.no_grad():
                yield
        finally:
            if self.ema is not None:
                self.ema.restore(self._parameters())
            for model in models:
                model.train()
            self.optimizer.train()


def _local(p: Tensor) -> Tensor:
    return p.to_local() if isinstance(p, DTensor) else p
