"""Evaluations of a Trainer that fall into a search for the cap: said once, and neither a best model nor the end of patience."""

import pytest
from transformers import EarlyStoppingCallback

from momo_hf.integrations.weights import unwrap_optimizer
from tests.integrations.test_transformers import PlainTrainer, arguments
from tests.toys import Net, Points


class Scripted(PlainTrainer):
    """Its evaluation gives the numbers that it is told, the best ones first."""

    searched = ()

    def evaluate(self, *args, **kwargs):
        searching = unwrap_optimizer(self.optimizer).searching
        self.searched += (searching,)
        metrics = {"eval_loss": 1.0 if searching else 2.0 - self.state.global_step / 1000}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def scripted(tmp_path, optim="momo_adam_auto", steps=90, callbacks=(), **options):
    args = arguments(
        tmp_path, optim=optim, max_steps=steps, eval_strategy="steps", eval_steps=5, save_strategy="steps", save_steps=5,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=False, label_names=["labels"], **options,
    )  # fmt: skip
    if optim == "momo_adam_auto":
        args.learning_rate = type(args).learning_rate
    trainer = Scripted(Net(), args, train_dataset=Points(), eval_dataset=Points(), callbacks=list(callbacks))
    trainer.train()
    return trainer


def goes_on(caplog):
    return sum("The search for the cap goes on" in record.getMessage() for record in caplog.records)


def test_best_model_and_patience_begin_after_the_search(tmp_path, caplog):
    trainer = scripted(tmp_path, callbacks=[EarlyStoppingCallback(2)])
    assert trainer.state.global_step == 90
    assert trainer.searched[0] and not trainer.searched[-1] and sum(trainer.searched) > 2
    assert trainer.state.best_metric == pytest.approx(1.91)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-90")
    assert goes_on(caplog) == 1


def test_a_schedule_on_plateaus_begins_after_the_search(tmp_path):
    trainer = scripted(
        tmp_path, lr_scheduler_type="reduce_lr_on_plateau", lr_scheduler_kwargs={"patience": 1, "factor": 0.1}
    )
    assert trainer.lr_scheduler.best == pytest.approx(1.91)
    assert trainer.lr_scheduler.num_bad_epochs == 0


def test_a_training_that_ends_within_the_search_has_no_best_model(tmp_path, caplog):
    trainer = scripted(tmp_path, steps=10, callbacks=[EarlyStoppingCallback(1)])
    assert trainer.state.global_step == 10 and trainer.state.best_model_checkpoint is None
    assert goes_on(caplog) == 1


def test_where_no_search_goes_on_everything_is_as_ever(tmp_path, caplog):
    trainer = scripted(tmp_path, optim="momo_adam", steps=10)
    assert trainer.state.best_metric == pytest.approx(1.99) and trainer.state.best_global_step == 10
    assert not goes_on(caplog)


def test_a_metric_that_is_not_there_is_an_error_during_a_search_too(tmp_path):
    class Other(Scripted):
        def evaluate(self, *args, **kwargs):
            return {"eval_other": 1.0}

    args = arguments(
        tmp_path, optim="momo_adam_auto", max_steps=5, eval_strategy="steps", eval_steps=5, metric_for_best_model="loss",
        label_names=["labels"],
    )  # fmt: skip
    with pytest.raises(KeyError, match="eval_loss"):
        Other(Net(), args, train_dataset=Points(), eval_dataset=Points()).train()
