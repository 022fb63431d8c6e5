"""The optimizer: the step, the two modes, the search, and what a step is given."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from momo_hf.compat import untraced
from momo_hf.optim.auto import begins, note_schedules, stand_in_of, take_cap
from momo_hf.optim.checks import NO_LOSS, check_group
from momo_hf.optim.intake import LossIntake
from momo_hf.optim.method import Method
from momo_hf.optim.record import scalar
from momo_hf.optim.state import has_gradients, init_state, is_probe, show
from momo_hf.optim.stateful import Stateful
from momo_hf.optim.steps.averaged import EVAL_MODE
from momo_hf.optim.steps.driver import take_step
from momo_hf.optim.steps.given import Given
from momo_hf.optim.steps.iterates import fit_iterates, write_iterates
from momo_hf.optim.steps.kind import Kind
from momo_hf.optim.steps.modelled import MODEL
from momo_hf.optim.steps.ramp import SEARCH, resume_ramp
from momo_hf.optim.steps.search import AUTO, Search, read_search
from momo_hf.optim.steps.verdict import Verdict
from momo_hf.optim.upkeep import dtypes_of, recast
from momo_hf.optim.watch import Watch
from momo_hf.optim.wrappers import refuse_parts


class MomoOptimizer(LossIntake, Stateful):
    """Base class of all MoMo optimizers: it keeps momentum, loss, step size and state for any method.

    There are three kinds of step, in `momo_hf.optim.steps`: along the momentum, as far as the model of the loss says (`modelled`);
    with `averaging`, a step that averages the iterates (`averaged`); and with `lr="auto"`, at first, the steps of a ramp that finds
    the cap (`ramp`). What a gradient does to the buffers, and the direction of a step, is up to the method (see `Method`). The momentum itself,
    d <- β d + (1-β) g with β from `group["beta"]` or `group["betas"][0]`, is kept here, in `exp_avg`.

    If something else moves the parameters, the model follows, as far as torch can see it (see `momo_hf.optim.steps.movement`).

    The numbers in the parameter groups (`step`, `effective_lr`, ...) are tensors that every step overwrites. Copy them
    (`float(x)`, `x.clone()`) to keep a value.

    Args:
        params: parameters or parameter groups.
        defaults: the options of a group: at least `lr`, `weight_decay`, `lb`, and `beta` or `betas`. Those that may be left out
            are `averaging`, `divide`, `use_fstar`, `bias_correction`, `foreach` and `compile`, as for `MomoAdam` and `Momo`.

    Attributes:
        methods: the methods that a group can have, by the name that goes into its option `method`; if there is only one,
            groups have no such option.
    """

    methods: ClassVar[Mapping[str, Method]] = {"momentum": Method()}

    def __new__(cls, *args: Any, **kwargs: Any) -> "MomoOptimizer":
        _leave_step_untraced()
        note_schedules()
        return super().__new__(cls)

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        refuse_parts(type(self).__name__)
        common: dict[str, Any] = {"divide": True, "use_fstar": False, "averaging": False}
        common |= {"foreach": None, "compile": False}
        if len(self.methods) > 1:
            common["method"] = next(iter(self.methods))
        defaults = {**common, "bias_correction": "betas" in defaults, **defaults}
        # Where plain tensors are parts of flat partitions (ZeRO): the processes that hold the other parts.
        self.shard_group: dist.ProcessGroup | None = None
        self._begin_anew()
        self._watch = Watch()
        super().__init__(params, defaults)
        # Some schedules compute with the default.
        self.defaults["lr"] = stand_in_of(type(self)) if defaults["lr"] == AUTO else defaults["lr"]

    def check_options(self, group: dict[str, Any]) -> None:
        """Raise a ValueError that names the option, its value and the fix, for a group whose options are wrong."""
        check_group(group, self.methods)

    def set_lb(self, lb: float) -> None:
        """Change the lower bound of the loss, in all groups, to a finite number that the loss never falls below."""
        for group in self.param_groups:
            self.check_options({**group, "lb": lb})
            group["lb"] = lb
        state = MODEL.read(self.param_groups)
        MODEL.write(self.param_groups, state._replace(fstar=torch.full_like(state.fstar, lb)))

    # ---- The step ----

    @torch.no_grad()
    def step(  # type: ignore[override]  # torch's step takes a closure alone
        self, closure: Callable[[], Tensor | float] | None = None, *, loss: Tensor | float | None = None
    ) -> Tensor | float | None:
        """Take one step.

        Args:
            closure: computes the loss, calls backward and returns the loss.
            loss: the loss of this step, see `set_loss`; instead of `closure`.

        Returns:
            The loss, as `closure` returned it or as it was given. As with torch's optimizers, nothing happens without gradients if
            there is no loss or no state either.

        Raises:
            ValueError: both `closure` and `loss` are given, or the loss is unusable (see `set_loss`).
            TypeError: the loss was given by position, where torch's optimizers take the closure.
            RuntimeError: no loss was given; a gradient is sparse or complex; the parameters hold the averaged weights.
        """
        if not self.trains and not (closure is None and loss is None and self._is_probed()):
            raise RuntimeError(EVAL_MODE.format(name=type(self).__name__))
        if closure is not None:
            loss = self._evaluate(closure, loss)
        given, clip_factor, whole_norm = self._take_loss(closure, loss)
        if given is None:
            if not has_gradients(self.param_groups):
                return loss
            if not self._is_probed():
                raise RuntimeError(NO_LOSS.format(name=type(self).__name__))
            init_state(self.param_groups, self.state, self.methods, self._searching)
            self._probed, self._fits = True, None
        elif has_gradients(self.param_groups) or self.state:
            self._take_step(given, clip_factor, whole_norm)
        return loss if loss is not None else given

    def _take_step(
        self,
        loss: Tensor | float,
        clip_factor: Tensor | float | None,
        whole_norm: bool = False,
        dropped: bool = False,
    ) -> None:
        """A step of the kind that it is to be, from what it is given (see `Given`)."""
        groups = self.param_groups
        self._make_ready()
        if self._searching and not self.state:
            self._searching = begins(groups)  # not where a schedule brings rates of its own
        init_state(groups, self.state, self.methods, self._searching)
        like = MODEL.first(groups)
        kind: Kind = self._ramp if self._searching else self._averaged if self.averages else self._modelled
        lr = self._rates.coming(groups, self.state, self._searching)
        given = Given(
            loss=scalar(loss, like),
            clip_factor=None if clip_factor is None else scalar(clip_factor, like).clamp(max=1.0),
            whole_norm=whole_norm,
            lr=lr,
            weight_decay=self._rates.decays(groups, lr),
            dropped=dropped,
        )
        # Parameters alike in these share a bucket; with averaging the largest `lr` counts, which can differ at one `lr`.
        alike = (*self._option_names(), *(("lr_max",) if self.averages else ()))
        update = take_step(kind, groups, self.state, self.methods, alike, self.shard_group, given)
        self.leave()
        if self._searching:
            self._verdict = Verdict(SEARCH.read(groups))
        else:
            self._rates.took(given.lr, update.accepted)
        show(groups, update.factor, update.accepted)
        self._watch.after_step(groups[0])

    @torch.no_grad()
    def drop_loss(self) -> None:
        loss = self._loss
        super().drop_loss()
        # With accelerate, its optimizer hears of skipped steps, and the loss is not averaged before one.
        if loss is not None and self.state and self.loss_source is None and self.searching:
            self._take_step(loss, None, dropped=True)

    def _is_probed(self) -> bool:
        self._heed()
        return is_probe(self.param_groups, self.state)

    # ---- Averaging ----

    @property
    def trains(self) -> bool:
        """Whether the parameters are where gradients are taken; always without averaging."""
        return not self.averages or self.param_groups[0]["train_mode"]

    def train(self) -> None:
        """Put the parameters where gradients are taken, as every step needs them; without `averaging` this does nothing."""
        self._switch(True)

    def eval(self) -> None:
        """Put the averaged weights into the parameters, to evaluate or save them; without `averaging` this does nothing.

        Going back by `train()` rounds float32 parameters once; further round trips change nothing more.
        """
        self._switch(False)

    @torch.no_grad()
    def _switch(self, train: bool) -> None:
        if not self.averages or self.trains == train:
            return
        self._make_ready()
        # While a search for the cap goes on there is nothing to average: the parameters are where it has led them.
        if not self._searching:
            write_iterates(self.param_groups, self.state, train)
        for group in self.param_groups:
            group["train_mode"] = train
        self.leave()

    def leave(self) -> None:
        """With averaging, remember how the parameters are left, to follow what else is done to them (`movement` does it
        without); forget it during a ramp, which ends where it began.
        """
        if self._searching and self.trains:
            self._averaged.outside.forget()
        elif self.averages:
            self._averaged.outside.leave(self.param_groups, self.state, self.trains)

    # ---- The search for the cap ----

    @property
    def search(self) -> Search | None:
        """The search for the cap: its steps, what they saw, and the cap once it is found; None if an `lr` was given. This reads
        the device.
        """
        self._heed()
        return read_search(SEARCH.read(self.param_groups)) if SEARCH.stands_in(self.param_groups[0]) else None

    @property
    def searching(self) -> bool:
        """Whether the next step belongs to the search. The host may have to wait for the last one."""
        self._heed()
        return self._searching and not (self._verdict is not None and self._verdict.over())

    def cap(self) -> Tensor:
        """The upper bound of the last step size, 0-dim: the largest of all groups; during a search, the step size itself."""
        self._heed()
        if self._searching:
            return torch.stack([group["effective_lr"] for group in self.param_groups]).max()
        return self._rates.taken(self.param_groups, self.state).max()

    def _make_ready(self) -> None:
        """Make the state what the coming step works on: after a search, a load, a probe, and in another dtype."""
        self._heed()
        if self._searching and not self.searching:
            self._searching, self._ramp.plan = False, None
            resume_ramp(self.state, False, self.averages)
            if self._verdict is not None:
                self._verdict.tell(self._rates.shares(self.param_groups, self.state))
        if not self._searching:
            take_cap(self.param_groups, self._verdict)
        self._verdict = None
        fits = self._searching, dtypes_of(self.param_groups)
        if self._fits != fits:
            recast(self.param_groups, self.state)
            if self.averages and not self._searching:
                fit_iterates(self.param_groups, self.state, self.methods, self.trains, self._probed)
            self._fits = fits
        self._probed = False
        if self.averages:
            self._averaged.outside.follow(self.param_groups, self.state, self.trains)


@functools.cache
def _leave_step_untraced() -> None:
    """Keep `torch.compile` out of the step; at the first optimizer, because this imports what any optimizer imports then.

    A graph around the step would hold its numbers as constants; the passes have graphs of their own (`compile`).
    """
    reason = "a step of a MoMo optimizer is not traced: compile the model, not the step"
    MomoOptimizer.step = untraced(MomoOptimizer.step, reason)  # type: ignore[method-assign]
