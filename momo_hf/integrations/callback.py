"""What a Trainer shows of MoMo: numbers in its logs, words about the cap, a summary."""

import logging
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from momo_hf.integrations.accelerate import momo_metrics
from momo_hf.integrations.bars import log_above_bars
from momo_hf.integrations.batch_norm import BatchNormStatistics
from momo_hf.integrations.evaluating import SEARCH_GOES_ON
from momo_hf.integrations.groups import methods_in_words
from momo_hf.integrations.learning_rate import note_at_start, warning_at_end, warning_at_start
from momo_hf.integrations.search_report import SearchReport
from momo_hf.integrations.weights import unwrap_optimizer
from momo_hf.optim import MomoOptimizer


logger = logging.getLogger(__name__)

# In the last entry of a log: the share of all steps on which the cap decided.
CAPPED = "momo/capped_in_all"


class MomoCallback(TrainerCallback):
    """Adds MoMo's numbers to the training logs, warns of a badly chosen `learning_rate`, and logs a summary at the end. What a search
    for the cap has seen it writes to `output_dir`, as `search.json` and `search.png`.

    Every Trainer with a MoMo optimizer gets this callback by itself, before its trackers. It reads the device at the logging steps
    only.

    Args:
        batch_norm_batches: number of batches of training data from which the statistics of BatchNorm are recomputed whenever the
            model is evaluated or saved, if the iterates are averaged; 0 leaves the statistics as training left them. Default 20.
    """

    def __init__(self, batch_norm_batches: int = 20) -> None:
        self.batch_norm = BatchNormStatistics(batch_norm_batches)
        self._before = (0.0, 0.0)  # steps and capped steps at the last log
        self._effective_lrs: list[float] = []
        self._warned = False
        self._report: SearchReport | None = None
        self._said_that_it_searches = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        self._effective_lrs = []
        optimizer = unwrap_optimizer(optimizer)
        if optimizer is None:
            return
        log_above_bars()
        if model is not None:
            self.batch_norm.begin(model)
        self._before = self._counts(optimizer)
        steps = state.max_steps - state.global_step
        self._report = SearchReport(optimizer, args.output_dir or "", state.is_world_process_zero, steps)
        message = warning_at_start(args, optimizer, model)
        self._warned = message is not None
        for line in filter(None, (note_at_start(args, optimizer), message)):
            if state.is_world_process_zero:
                logger.warning(line)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._report is not None:
            self._report.after_step()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        optimizer = unwrap_optimizer(optimizer)
        if optimizer is None or self._said_that_it_searches or not (optimizer.state and optimizer.searching):
            return
        self._said_that_it_searches = True
        if state.is_world_process_zero:
            logger.warning(SEARCH_GOES_ON.format(step=state.global_step))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        optimizer = unwrap_optimizer(optimizer)
        if optimizer is None or logs is None or "loss" not in logs:
            return
        metrics = momo_metrics(optimizer)
        counts = self._counts(optimizer)
        steps, capped = (now - before for now, before in zip(counts, self._before))
        self._before = counts
        metrics["momo/capped"] = capped / steps if steps else 0.0
        if counts[0]:  # none during a search
            self._effective_lrs.append(metrics["momo/effective_lr"])
        if (optimizer.averages or optimizer.search is not None) and "learning_rate" in logs:
            # The schedule's number lacks the warmup after a search, and has a decay that an average does not follow.
            metrics["learning_rate"] = metrics["momo/cap"]
        logs.update(metrics)
        state.log_history[-1].update(metrics)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        optimizer = unwrap_optimizer(optimizer)
        if optimizer is None:
            return
        optimizer.eval()  # what is done with the model from now on is done with the averaged weights
        if self._report is not None:
            self._report.at_end()
        steps, capped = self._counts(optimizer)
        if not state.is_world_process_zero or steps == 0:
            return
        metrics = momo_metrics(optimizer)
        lrs = torch.tensor(self._effective_lrs or [metrics["momo/effective_lr"]])
        where = "at the logging steps" if self._effective_lrs else "at the last step"
        search = optimizer.search
        found = "" if search is None else f" The cap, {search.cap:.2g}, was found in {search.steps} steps before."
        methods = methods_in_words(optimizer)
        if state.log_history:
            state.log_history[-1][CAPPED] = capped / steps  # which the shares since the last log do not add up to
        advice = "" if self._warned else warning_at_end(optimizer, capped / steps)
        logger.warning(
            f"{type(optimizer).__name__} {f'({methods}) ' if methods else ''}used step sizes from {lrs.min():.2e} to {lrs.max():.2e}, median "
            f"{lrs.median():.2e} ({where}); the cap decided {capped / steps:.0%} of {steps:.0f} steps, and "
            f"{metrics['momo/skipped']:.0f} were skipped.{found}{advice}"
        )

    @staticmethod
    def _counts(optimizer: MomoOptimizer) -> tuple[float, float]:
        group = optimizer.param_groups[0]
        return tuple(torch.stack([group["step"], group["capped"]]).tolist())
