"""The lower bound of smoothed labels: what it is, and that it is set only where the loss is the smoothed one."""

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, Trainer
from transformers.trainer_pt_utils import LabelSmoother

from momo_hf import MomoAdam, MomoOptimizer, MomoTrainer, label_smoothing_bound
from tests.integrations.test_transformers import arguments
from tests.toys import Points


@pytest.mark.parametrize("epsilon, classes", [(0.1, 7), (0.3, 50), (1.0, 3)])
def test_the_bound_is_what_the_label_smoother_can_reach(epsilon, classes):
    logits = nn.Parameter(torch.zeros(1, 1, classes, dtype=torch.float64))
    labels = torch.zeros(1, 1, dtype=torch.long)
    # Without a line search rounding decides, and so the machine, whether it gets there.
    options = {"line_search_fn": "strong_wolfe", "tolerance_grad": 1e-12, "tolerance_change": 1e-14}
    optimizer = torch.optim.LBFGS([logits], lr=0.5, max_iter=500, **options)

    def closure():
        optimizer.zero_grad()
        loss = LabelSmoother(epsilon)({"logits": logits}, labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert label_smoothing_bound(epsilon, classes) == pytest.approx(float(closure().detach()), abs=1e-6)


class Classifier(nn.Module):
    """Has what Trainer's label smoother needs: logits."""

    def __init__(self):
        super().__init__()
        self.config = PretrainedConfig()
        self.out = nn.Linear(5, 11)

    def forward(self, inputs, labels=None):
        return {"logits": self.out(inputs)}


class OwnLoss(Classifier):
    """Brings its own loss, from targets that Trainer does not know as labels."""

    def forward(self, inputs, targets):
        logits = self.out(inputs)
        return {"loss": nn.functional.cross_entropy(logits, targets), "logits": logits}


class Labelled(Points):
    def __init__(self, name="labels"):
        super().__init__()
        self.name = name

    def __getitem__(self, index):
        return {"inputs": self.inputs[index], self.name: torch.tensor(index % 11)}


def plain(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs["logits"], labels)


class Overrides(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(inputs["inputs"])
        loss = plain(outputs, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class CallsSuper(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class SmoothsInEvaluation(Overrides):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        cls = Overrides if model.training else Trainer
        return cls.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


class NamedElsewhere(Trainer):
    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        return MomoAdam, {"lr": args.learning_rate}


class Bare(MomoOptimizer):
    """A method of its own, with nothing in its signature that the package could know."""

    def __init__(self, params, **options):
        super().__init__(params, {"lr": 0.1, "weight_decay": 0.0, "lb": 0.0, "beta": 0.9, **options})


def lb_after_training(trainer_class, tmp_path, model=Classifier, data="labels", options=None, **kwargs):
    args = arguments(tmp_path, label_smoothing_factor=0.1, max_steps=2, **(options or {}))
    trainer = trainer_class(model(), args, train_dataset=Labelled(data), **kwargs)
    trainer.train()
    trainer.evaluate(Labelled(data))
    assert trainer.state.log_history[1]["momo/lb"] == pytest.approx(trainer.optimizer.param_groups[0]["lb"])
    return trainer.optimizer.param_groups[0]["lb"]


BOUND = label_smoothing_bound(0.1, 11)


@pytest.mark.parametrize(
    "expected, trainer, options",
    [
        (BOUND, Trainer, {}),
        (BOUND, MomoTrainer, {}),
        (BOUND, CallsSuper, {}),
        (BOUND, NamedElsewhere, {"options": {"optim": "adamw_torch"}}),
        (BOUND, Trainer, {"optimizer_cls_and_kwargs": (Bare, {}), "options": {"optim": "adamw_torch"}}),
        (0.25, Trainer, {"options": {"optim_args": "lb=0.25"}}),
        (0.25, Trainer, {"optimizer_cls_and_kwargs": (Bare, {"lb": 0.25})}),
        (0.0, Trainer, {"compute_loss_func": plain}),
        (0.0, Overrides, {}),
        (0.0, SmoothsInEvaluation, {}),
        (0.0, Trainer, {"model": OwnLoss, "data": "targets", "options": {"label_names": ["targets"]}}),
    ],
)
def test_the_bound_is_set_where_the_loss_is_the_smoothed_one(expected, trainer, options, tmp_path):
    assert lb_after_training(trainer, tmp_path, **options) == expected


def test_a_loss_that_is_not_smoothed_is_trained_to_the_same_end(tmp_path):
    finals = []
    for smoothing in (0.0, 0.1):
        torch.manual_seed(0)
        args = arguments(tmp_path, learning_rate=0.1, max_steps=60, label_smoothing_factor=smoothing)
        trainer = Trainer(Classifier(), args, train_dataset=Labelled(), compute_loss_func=plain)
        finals.append(trainer.train().training_loss)
    assert finals[0] == finals[1]
