"""What a Trainer makes of its evaluations while a search for the cap goes on: a word, and nothing else.

The weights of a search go back to where they began, so that they are no best model, and what is worse after it has not stopped
getting better: best model, the patience of an early stopping and that of a schedule on plateaus begin after the search.
"""

from collections.abc import Callable
from typing import Any

from transformers import Trainer

from momo_hf.integrations.weights import unwrap_optimizer
from momo_hf.integrations.wrapping import wrap_once


SEARCH_GOES_ON = (
    "The search for the cap goes on: what was evaluated at step {step} are weights that it is going to take back. Best model and early "
    "stopping begin after it."
)


def _searches(trainer: Trainer) -> bool:
    optimizer = unwrap_optimizer(trainer.optimizer)
    return optimizer is not None and optimizer.searching


def _determine_best_metric(original: Callable) -> Callable:
    def determine_best_metric(self: Trainer, *args: Any, **kwargs: Any) -> bool:
        state = self.state
        before = state.best_metric, state.best_global_step
        found = original(self, *args, **kwargs)  # a metric that is not there is said as ever
        if _searches(self):
            state.best_metric, state.best_global_step = before
            return False
        return found

    return determine_best_metric


def _evaluate(original: Callable) -> Callable:
    def evaluate(self: Trainer, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> Any:
        return original(self, trial, ignore_keys_for_eval, skip_scheduler=skip_scheduler or _searches(self))

    return evaluate


def install() -> None:
    """Wrap what a Trainer does after an evaluation; once."""
    wrap_once(Trainer, "_determine_best_metric", _determine_best_metric)
    wrap_once(Trainer, "_evaluate", _evaluate)
