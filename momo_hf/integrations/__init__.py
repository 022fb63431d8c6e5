"""How the loss reaches the optimizer, and how the optimizer gets its names.

For the maintainer of another trainer, supporting MoMo takes these lines:

1. `import momo_hf` once. If the trainer calls `Accelerator.backward(loss)` and `Accelerator.clip_grad_norm_(...)` and
   passes the optimizer to `Accelerator.prepare`, nothing else is needed, with accumulation, several ranks, bf16, fp16.
2. Without accelerate, before every `optimizer.step()`: `optimizer.set_loss(loss)`, where `loss` is the scalar whose
   gradient is in `p.grad`: the sum over micro-batches of what was backpropagated, without a loss scaler's factor, and
   averaged over the data-parallel ranks.
3. After clipping by hand: `optimizer.set_clip_factor(max_norm / (norm + 1e-6))`.
4. Where a loss scaler skips a step: `optimizer.drop_loss()`.
5. `group["lr"]` belongs to the scheduler. Log `momo_hf.momo_metrics(optimizer)` at the logging steps.
"""
