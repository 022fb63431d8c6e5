"""How the loss reaches the optimizer, and how the optimizer gets its names.

**The loss of a step is the sum of what was backpropagated into the gradients that the optimizer is about to use, scaled
as they were, averaged over the processes over which they were averaged.** How that is kept true:

1. `gradients` sees where an optimizer's gradients are, and in which process groups DDP or FSDP2 averages them now.
2. `Accelerator.backward` starts to average the loss in the same groups, before the backward pass; afterwards the loss
   goes to the one optimizer whose gradients have changed, and to none if none of them has.
3. `window` keeps that sum beside the gradients, and looks at them before every backward pass, clip and step: gone or
   zeroed gradients take their loss with them, kept ones keep it, over exceptions and over steps too.
4. `Accelerator.clip_grad_norm_` scales the sum as the gradients, if some of them are this optimizer's.
5. A step asks the window, after its closure was called. A loss or factor given by hand wins, and is averaged alike.
6. With ZeRO gradients are in the engine, and the step within the last backward pass: the window goes by its calls.

For the maintainer of another trainer, supporting MoMo takes these lines:

1. `import momo_hf` once. If the trainer calls `Accelerator.backward(loss)` and `Accelerator.clip_grad_norm_(...)` and
   passes the optimizer to `Accelerator.prepare`, nothing else is needed, with accumulation, several ranks, bf16, fp16.
   Where the backpropagated scalar is not the loss (a gradient cache), call `optimizer.set_loss(loss)` before the step.
2. Without accelerate, before every `optimizer.step()`: `optimizer.set_loss(loss)`, where `loss` is the scalar whose
   gradient is in `p.grad`: the sum over micro-batches of what was backpropagated, without a loss scaler's factor, and
   averaged over the data-parallel ranks.
3. After clipping by hand: `optimizer.set_clip_factor(max_norm / (norm + 1e-6))`.
4. Where a loss scaler skips a step: `optimizer.drop_loss()`.
5. `group["lr"]` belongs to the scheduler; only the end of a search multiplies it, see `optim.auto`. Log `momo_hf.momo_metrics(optimizer)` at the logging steps.
"""

from momo_hf.integrations.on_import import OnImport


_WATCH = OnImport(
    __name__,
    {
        "torch.nn": "momo_hf.integrations.modes",
        "accelerate": "momo_hf.integrations.accelerate",
        "transformers.training_args": "momo_hf.integrations.names",
        "transformers.trainer": "momo_hf.integrations.transformers",
        "transformers.modeling_utils": "momo_hf.integrations.saving",
        "peft.peft_model": "momo_hf.integrations.saving",
        "diffusers.models.modeling_utils": "momo_hf.integrations.saving",
    },
)


def install() -> None:
    """Wire the optimizers into accelerate and transformers, each as soon as it is imported, or now if it is; once.

    `import momo_hf` calls it. The modules of this package have no effect when they are imported.
    """
    _WATCH.install()
