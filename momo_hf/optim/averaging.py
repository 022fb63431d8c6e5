"""Averaging of the iterates (schedule-free): its step, and the two modes of the parameters.

Only z is stored beside the method's buffers. In train mode a parameter holds y = (1-β) z + β x, the point where loss and
gradient are taken; in eval mode it holds x, the average, which is to be evaluated and saved. Each follows from the other
two. A parameter in bfloat16 or float16 cannot hold the small changes of y, so y is stored for it too. The mathematics is
in `averaged_model`, the passes over the parameters in `averaged_passes`.
"""

from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from momo_hf.optim.averaged_model import AverageState, next_averaged_step
from momo_hf.optim.averaged_passes import parts_of, put, sums_of, write
from momo_hf.optim.buckets import sort_into_buckets
from momo_hf.optim.scalars import keep
from momo_hf.optim.sharding import layouts_of


# β of y where nobody gives another one. Schedule-free learning mostly takes 0.9; with a Polyak step and a cap from a search,
# over 1,000 steps, 0.8 was at least as good in 18 of 20 runs on ten tasks, and 0.95 worse.
SHARE = 0.8

EVAL_MODE = (
    "{name}.step() was called in eval mode, where the parameters hold the averaged weights, so the gradients were taken "
    "at the wrong point. Call optimizer.train() before the forward passes of training, and optimizer.eval() before "
    "evaluating or saving. Trainer calls both."
)


class Averaging:
    """The part of an optimizer that averages its iterates, where its groups have `averaging`.

    This is schedule-free learning (Defazio et al. 2024) with a Polyak step (Gower, Loizou 2025). z takes the steps, x is the
    average of the z, weighted by w, k times the squared largest τ so far, and loss and gradient are taken at y between them:

        y = (1-β) z + β x,    τ = min(lr, avg[f(y) - lb + <g, z - y>]_+ / avg<g, D^{-1} g>)
        z <- (z - τ D^{-1} g) / (1 + lr λ),    x <- x + (w / Σ w) (z - x)

    β is `averaging`, or 0.8 where that is True; the averages in τ have the method's own β1.

    The parameters hold y in training, and x from `optimizer.eval()` to `optimizer.train()`. x is what is to be evaluated,
    sampled from and saved. Trainer does so by itself; in other loops both calls stand beside those of the model, on every
    process:

        model.train(), optimizer.train()  # before the forward passes of training; a new optimizer is in this mode
        model.eval(), optimizer.eval()  # before evaluating and saving, and at the end of training

    A step in eval mode is an error. What is evaluated in train mode is y, which is not seen here. The mode is a part of
    the state, so load model and optimizer from one checkpoint.

    * lr: no schedule is needed after the warmup. In one that ends at 0 the weights w do not fall with it, so that the last z,
      which hardly differ, count like all others. With `lr="auto"` a schedule that falls is not followed.
    * Decay acts on z (proximal), or with `divide=False` on y, as in schedule-free AdamW.
    * Memory: that of the method without averaging; in bfloat16 and float16 4 bytes a parameter more, for y.
    * Others' averages of the parameters (EMA) are averages of y: leave them out. BatchNorm's statistics are those of y:
      before evaluating, run some batches in `model.train()` after `optimizer.eval()`.
    * Changes of the parameters from outside reach neither z nor x as they should: masks and projections do not hold,
      averages over workers (LocalSGD) are wrong, and ZeRO is refused.
    """

    param_groups: list[dict[str, Any]]
    state: dict[Tensor, dict[str, Tensor]]
    buffers: tuple[str, ...]
    shard_group: dist.ProcessGroup | None
    # Whether the state was made for torch.distributed.checkpoint, perhaps before the weights were loaded.
    _probed = False

    @property
    def averages(self) -> bool:
        """Whether the iterates are averaged."""
        return bool(self.param_groups) and bool(self.param_groups[0].get("averaging", False))

    @property
    def trains(self) -> bool:
        """Whether the parameters are where gradients are taken; always without averaging."""
        return not self.averages or self.param_groups[0]["train_mode"]

    @property
    def _entries(self) -> tuple[str, ...]:
        """The entries of the state of every parameter."""
        return ("z" if self.averages else "exp_avg", *self.buffers)

    # ---- The modes ----

    def train(self) -> None:
        """Put the parameters where gradients are taken, as before every step; nothing is done without `averaging`."""
        self._switch(True)

    def eval(self) -> None:
        """Put the averaged weights into the parameters, to evaluate or save; nothing is done without `averaging`.

        The way back rounds float32 parameters once; any number of further round trips changes nothing more.
        """
        self._switch(False)

    @torch.no_grad()
    def _switch(self, train: bool) -> None:
        if not self.averages or self.trains == train:
            return
        # While a search for the cap goes on there is nothing to average: the parameters are where it has led them.
        begun = not self.search_goes_on()
        if begun and self._probed:
            self._start_here()
        for group in self.param_groups:
            if begun:
                put([(p, self.state[p]) for p in group["params"] if p in self.state], group["averaging"], train)
            group["train_mode"] = train

    def _check_mode(self) -> None:
        if not self.trains:
            raise RuntimeError(EVAL_MODE.format(name=type(self).__name__))

    # ---- The step ----

    def _averaged_step(self, loss: Tensor, clip_factor: Tensor | None, lr: Tensor, weight_decay: Tensor) -> None:
        """Take one step.

        Args:
            loss: 0-dim, in the dtype of the scalars.
            clip_factor: κ, 0-dim, at most 1; or None.
            lr: the caps α_g, shape (groups,).
            weight_decay: λ_g, shape (groups,).
        """
        if self._probed:
            self._start_here()
            self._probed = False
        params = self._params()
        places = layouts_of(params, self.shard_group)
        # Where the parameter itself holds y.
        entries = {p: {"y": p, **self.state[p]} for p in params if p in self.state}
        buckets = sort_into_buckets(
            self.param_groups, entries, ("y", "z", *self.buffers), self._option_names(), places
        )
        model, group = self._model_state(), self.param_groups[0]
        parts = parts_of(type(self), buckets, model.step + 1)
        # The same layouts in the same order on all processes, also where a process has no gradient.
        sums = sums_of(parts, dict.fromkeys((None, *places)), lr)
        model, averages, update = next_averaged_step(
            model,
            self._average_state(),
            loss,
            sums,
            lr,
            weight_decay,
            lb=group["lb"],
            beta=self._beta(group),
            bias_correction=group["bias_correction"],
            divide=group["divide"],
            clip_factor=clip_factor,
        )
        write(parts, update, group["averaging"])
        self._keep(model)
        self._keep(averages)
        self._show(update)
        self._keep_undecayed(update.ok)

    def _undecayed(self, lr: Tensor) -> Tensor:
        """The largest `lr` of every group so far, where it is averaged and `lr` is a share of a cap that was found.

        So a warmup acts, and the linear decay that is Trainer's default does not: an average needs none, and lost by it on
        most tasks.
        """
        return self._per_group("lr_max", lr).maximum(lr) if self.averages and self._searches() else lr

    def _keep_undecayed(self, ok: Tensor) -> None:
        """Remember the largest `lr`, also from the steps of a search, unless the step was dropped."""
        if self.averages and self._searches():
            like = self._model_state().step
            highest, before = self._undecayed(self._per_group("lr", like)), self._per_group("lr_max", like)
            entries = [(group, "lr_max") for group in self.param_groups]
            keep(entries, torch.where(ok & highest.isfinite(), highest, before).unbind())

    # ---- The state ----

    def _average_state(self) -> AverageState:
        home = self._home()
        return AverageState(*(self.param_groups[0][name].to(home) for name in AverageState._fields))

    def _widen_averages(self, dtype: torch.dtype) -> None:
        """Give every group the mode and the scalars of the first, which are 0 at the start, in this dtype."""
        head = self.param_groups[0]
        # A tensor for each: torch.distributed.checkpoint loads into them in place.
        start = AverageState(*(torch.zeros((), device=self._home()) for _ in AverageState._fields))
        self._keep(AverageState(*(head.get(name, zero).to(dtype) for name, zero in start._asdict().items())))
        for group in self.param_groups:
            group["train_mode"] = head.get("train_mode", True)
            group["lr_max"] = group.get("lr_max", torch.zeros((), device=self._home())).to(dtype)

    def _first_iterates(self, p: Tensor) -> dict[str, Tensor]:
        """z, and y where the parameter cannot hold it, of a parameter that gets its first gradient: all are one point."""
        if not self.averages:
            return {}
        dtype = torch.promote_types(p.dtype, torch.float32)
        start = {"z": torch.zeros_like(p, dtype=dtype).copy_(p.detach())}
        return start if dtype == p.dtype else start | {"y": start["z"].clone()}

    def _start_here(self) -> None:
        """Start at the weights as they are now, where torch.distributed.checkpoint had the state made before."""
        for p in self.state:
            self.state[p].update(self._first_iterates(p))

    def _fit_entries(self) -> None:
        """Make or drop the stored y where the state comes from parameters of another dtype."""
        for group in self.param_groups if self.averages else ():
            for p in filter(self.state.__contains__, group["params"]):
                entry, rounds = self.state[p], p.dtype.itemsize < 4
                if not rounds:
                    entry.pop("y", None)
                elif "y" not in entry:
                    held, beta = p.detach().to(entry["z"].dtype), group["averaging"]
                    entry["y"] = held.clone() if self.trains else torch.lerp(entry["z"], held, beta)


def share_of(averaging: bool | float) -> bool | float:
    """β for the option `averaging`, or False.

    Raises:
        ValueError: it is neither a flag nor a number between 0 and 1.
    """
    if averaging is True or averaging is False:
        return averaging and SHARE
    if not (isinstance(averaging, Real) and 0 < averaging < 1):
        raise ValueError(
            "`averaging` must be True, False or a number in (0, 1), the share of the average in the point where gradients "
            f"are taken, got {averaging!r}. True stands for {SHARE}."
        )
    return float(averaging)


def check_averaging(group: dict[str, Any]) -> None:
    """Raise a ValueError for an option of a parameter group that does not go with averaging."""
    if not share_of(group["averaging"]):
        return
    for name, neutral in (("use_fstar", False), ("compile", False)):
        if group.get(name, neutral) != neutral:
            raise ValueError(
                f"`{name}` must be {neutral!r} with averaging, got {group[name]!r}: the step that averages has "
                "neither the momentum nor the compiled passes that it is for."
            )
