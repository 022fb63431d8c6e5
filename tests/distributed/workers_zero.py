"""DeepSpeed ZeRO through accelerate, on the same batches as `workers.train`."""

import os

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin

from momo_hf.integrations.weights import unwrap_optimizer
from tests.distributed.workers import METHODS, SCALARS, pretend, rows_of
from tests.toys import Net, Points


ENVIRONMENT = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false"}


def prepare(stage, method="momo_adam", accumulation=1, clip=0.0, config=None, groups=1, **options):
    pretend("zero")
    settings = {
        "zero_optimization": {"stage": stage, **(config or {}).pop("zero_optimization", {})},
        "train_micro_batch_size_per_gpu": 12 // (int(os.environ["WORLD_SIZE"]) * accumulation),
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        **(config or {}),
    }
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings))
    model = Net()
    parameters = list(model.parameters())
    split = [parameters] if groups == 1 else [parameters[:2], parameters[2:]]
    optimizer = METHODS[method]([{"params": part} for part in split], **{"lr": 1.0, "weight_decay": 0.01, **options})
    model, optimizer = accelerator.prepare(model, optimizer)
    return accelerator, model, optimizer


def steps_of(accelerator, model, optimizer, steps, accumulation=1, first=0):
    data, log = Points(), []
    momo = unwrap_optimizer(optimizer)
    for step in range(first, first + steps):
        for micro in range(accumulation):
            rows = rows_of(step, accelerator.process_index, accelerator.num_processes, accumulation, micro)
            with accelerator.accumulate(model):
                accelerator.backward(model(data.inputs[rows], data.labels[rows])["loss"])
                optimizer.step()
                optimizer.zero_grad()
        log.append([float(momo.param_groups[0][name]) for name in SCALARS])
    return torch.tensor(log, dtype=torch.float64)


def matrix(folder):
    results = {}
    for stage in (1, 2, 3):
        for method in METHODS:
            for accumulation, clip in ((1, 0.0), (2, 0.5)):
                made = prepare(stage, method, accumulation, clip)
                results[f"{stage} {method} {accumulation} {clip}"] = steps_of(
                    *made, steps=20, accumulation=accumulation
                )
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory that nobody has written holds NaN
    results["unwritten"] = steps_of(*prepare(3), steps=20)
    torch.use_deterministic_algorithms(False)
    for name in ("by hand", "interrupted"):
        results[name] = by_hand_or_interrupted(name)
    return results


class Interrupted(torch.autograd.Function):
    """Passes a value through and raises in the backward pass."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("interrupted")


def by_hand_or_interrupted(name):
    """Two accumulated steps; the losses are given by hand, or the second backward pass fails at first."""
    accelerator, model, optimizer = prepare(1, accumulation=2)
    data, momo, log = Points(), unwrap_optimizer(optimizer), []
    for step in range(2):
        losses = []
        for micro in range(2):
            rows = rows_of(step, accelerator.process_index, accelerator.num_processes, 2, micro)
            with accelerator.accumulate(model):
                losses.append(model(data.inputs[rows], data.labels[rows])["loss"])
                if name == "by hand":
                    if micro == 1:
                        optimizer.set_loss(sum(loss.detach() for loss in losses) / 2)
                    accelerator.backward(losses[-1] + 1e3)
                    continue
                if micro == 1:
                    try:
                        accelerator.backward(Interrupted.apply(1e3 * losses[-1]))
                    except RuntimeError as error:
                        assert "interrupted" in str(error)
                accelerator.backward(losses[-1])
        log.append([float(momo.param_groups[0][scalar]) for scalar in SCALARS])
    return torch.tensor(log, dtype=torch.float64)


def refusals(folder):
    """Messages of the situations in which there is no single step size."""
    cases = {
        "stage 0": {"stage": 0},
        "groups": {"stage": 2, "groups": 2},
        "averaging": {"stage": 1, "averaging": True},
        "sub-groups": {"stage": 3, "config": {"zero_optimization": {"sub_group_size": 10}}},
        "offload": {"stage": 2, "config": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}},
    }
    messages = {}
    for name, case in cases.items():
        try:
            steps_of(*prepare(**case), steps=1)
            messages[name] = "nothing was refused"
        except ValueError as error:
            messages[name] = str(error)
    return messages
