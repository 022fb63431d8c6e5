"""What every MoMo method shares: parameter groups, the two passes over the parameters, the state."""

import functools
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from momo_hf.compat import untraced
from momo_hf.optim.averaged_model import AverageState
from momo_hf.optim.averaging import Averaging, check_averaging, share_of
from momo_hf.optim.checkpoints import take_back, with_defaults, with_starts
from momo_hf.optim.checks import NO_LOSS, SHARED_OPTIONS, check_group, check_one_model
from momo_hf.optim.intake import LossIntake
from momo_hf.optim.method import Method
from momo_hf.optim.model import ModelState, Step, with_drift
from momo_hf.optim.modelling import Modelling
from momo_hf.optim.movement import Movement
from momo_hf.optim.scalars import Vectors, keep, scalar
from momo_hf.optim.searching import Searching, check_origins
from momo_hf.optim.sharding import Layout, local
from momo_hf.optim.watch import Watch


# What the groups hold beside their options.
SCALARS = (*ModelState._fields, *AverageState._fields, "effective_lr", "lr_max", "train_mode")


class MomoOptimizer(Method, Modelling, Searching, Averaging, LossIntake, Optimizer):
    """Base class of the MoMo methods: momentum, loss, step size and state. A method adds its preconditioner.

    A method names its `buffers` and says how a gradient enters them (`update_buffers`) and what D^{-1} does to a vector
    (`precondition`), see `Method`; without these it is MoMo on plain momentum. The momentum itself,
    d <- β d + (1-β) g with β from `group["beta"]` or `group["betas"][0]`, lives here, in `exp_avg`.

    The model follows what the parameters do (see `movement`): rounding, and changes between steps that torch can see. It
    cannot see `p.data.copy_()` (as in diffusers' `EMAModel.copy_to`; harmless where `restore` follows), writes through
    NumPy or another view that has no part in the tensor's version, and `torch._foreach_` functions on DTensors.

    A step is a transaction (see `kernels`): it writes all, or nothing where loss or gradients were not finite.

    The numbers in the parameter groups (`step`, `effective_lr`, ...) are tensors that every step writes into: keep
    `float(...)` or a clone of one that you want to look at later.

    With `averaging` in the defaults the iterates are averaged instead of the gradients, see `Averaging`.

    With `lr="auto"` the first steps, 13 to 60, find the cap (see `search`), and then the weights go back to where they
    began, once. `Searching` says what that means for what else looks at the weights.

    Args:
        params: parameters or parameter groups.
        defaults: the options of a group; `lr`, `weight_decay`, `lb`, and `beta` or `betas` at least.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "MomoOptimizer":
        _leave_step_untraced()
        return super().__new__(cls)

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        common = {"divide": True, "use_fstar": False, "averaging": False}
        common |= {"foreach": None, "compile": False}
        defaults = {**common, "bias_correction": "betas" in defaults, **defaults}
        self._watch = Watch()
        self._movement = Movement()
        self._vectors = Vectors()
        # Where plain tensors are parts of flat partitions (ZeRO): the processes that hold the other parts.
        self.shard_group: dist.ProcessGroup | None = None
        super().__init__(params, defaults)

    def check_options(self, group: dict[str, Any]) -> None:
        """Raise a ValueError that names the option, its value and the fix, for a group whose options are wrong."""
        check_group(group)
        check_averaging(group)

    def set_lb(self, lb: float) -> None:
        """Change the lower bound of the loss, in all groups, to a finite number that the loss never falls below."""
        for group in self.param_groups:
            self.check_options({**group, "lb": lb})
            group["lb"] = lb
        state = self._model_state()
        self._keep(state._replace(fstar=torch.full_like(state.fstar, lb)))

    def _has_gradients(self) -> bool:
        return any(p.grad is not None for group in self.param_groups for p in group["params"])

    # ---- The step ----

    @torch.no_grad()
    def step(
        self, closure: Callable[[], Tensor | float] | None = None, *, loss: Tensor | float | None = None
    ) -> Tensor | float | None:
        """Take one step.

        Args:
            closure: computes the loss, calls backward and returns the loss.
            loss: the loss of this step, see `set_loss`; instead of `closure`.

        Returns:
            The loss, as `closure` returned it or as it was given. Without any gradient, and without a loss or with
            nothing learnt from earlier ones, there is nothing to do, as with torch's optimizers.

        Raises:
            ValueError: both `closure` and `loss` are given, or the loss is unusable (see `set_loss`).
            TypeError: the loss was given by position, where torch's optimizers take the closure.
            RuntimeError: no loss was given since the last step; a gradient is sparse or complex.
        """
        self._check_mode()
        if closure is not None:
            if not callable(closure):
                raise TypeError(
                    f"step() takes a closure by position, got {type(closure).__name__}. Give the loss by name: "
                    "step(loss=loss)."
                )
            if loss is not None:
                raise ValueError("step() takes `closure` or `loss`, got both: the closure already returns the loss.")
            with torch.enable_grad():
                loss = closure()
        given, clip_factor, whole_norm = self._take_loss(closure, loss)
        if not self._has_gradients() and (given is None or not self.state):
            return loss
        if given is None:
            if self._is_state_probe():
                self._init_state()
                self._probed = True
                return None
            raise RuntimeError(NO_LOSS.format(name=type(self).__name__))
        searching = self.search_goes_on()
        self._init_state()
        if searching:
            self._search_step(given, clip_factor)
            return loss if loss is not None else given

        like = self._model_state().step
        value = scalar(given, like)
        clip_factor = None if clip_factor is None else scalar(clip_factor, like).clamp(max=1.0)
        if self.averages:
            self._averaged_step(value, clip_factor, *self._rates(like))
        else:
            self._modelled_step(value, clip_factor, whole_norm, *self._rates(like))
        self._watch.after_step(self.param_groups[0])
        return loss if loss is not None else given

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @staticmethod
    def _layouts(params: list[Tensor], places: list[Layout | None]) -> dict[Layout | None, bool]:
        """Every layout of the model and whether parameters in it round; in the same order on all processes, also where
        a process has no gradient.
        """
        layouts: dict[Layout | None, bool] = {None: False}
        for layout, dtype in dict.fromkeys(zip(places, [p.dtype for p in params])):
            layouts[layout] = layouts.get(layout, False) or dtype.itemsize < 4
        return layouts

    def _rates(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """α and λ of all groups, for the coming step."""
        lr = self._undecayed(self._per_group("lr", like))
        return self._capped(lr, like + 1), self._per_group("weight_decay", like)

    def _per_group(self, option: str, like: Tensor) -> Tensor:
        """An option of all groups as a vector, without a read-back where it is a tensor."""
        return self._vectors.of(self.param_groups, option, like)

    @staticmethod
    def _beta(group: dict[str, Any]) -> float:
        return group["beta"] if "beta" in group else group["betas"][0]

    def _option_names(self) -> tuple[str, ...]:
        # Unpickling adds torch's own "differentiable" to the defaults, but not to the groups.
        return tuple(name for name in self.defaults if name != "differentiable")

    # ---- The state ----

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; it joins the running model of the others, whose options it has where all must agree.

        What the scalars of another group were, in a copy of it, is left behind.
        """
        options = {name: value for name, value in param_group.items() if name not in SCALARS}
        shared = self.param_groups[0] if self.param_groups else {}
        super().add_param_group({**{name: shared[name] for name in SHARED_OPTIONS if name in shared}, **options})
        group, head = self.param_groups[-1], self.param_groups[0]
        try:
            self._join_search(group)
            self.check_options(group)
            group["averaging"] = share_of(group["averaging"])
            check_one_model(group, head)
        except ValueError:
            self.param_groups.pop()
            raise
        if group is head:
            self._keep(ModelState(*(torch.zeros((), device=self._home()) for _ in ModelState._fields)))
        self._widen()
        if group is head:
            group["fstar"] = torch.full_like(group["fstar"], group["lb"])
        group.setdefault("effective_lr", torch.zeros_like(head["step"]))

    def _home(self) -> torch.device:
        """Where the scalars live: with the first parameter that has memory."""
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        return next((p.device for p in params if p.device.type != "meta"), torch.device("cpu"))

    def _model_state(self) -> ModelState:
        home = self._home()
        return ModelState(*(self.param_groups[0][name].to(home) for name in ModelState._fields))

    def _keep(self, state: ModelState | AverageState) -> None:
        """Store the scalars in every group, so that any of them carries the whole model through a checkpoint."""
        head, *others = self.param_groups
        keep([(head, name) for name in state._fields], state)
        for group in others:
            group.update({name: head[name] for name in state._fields})

    def _widen(self) -> None:
        """Give every group the scalars of the first, in float64 if any parameter is in float64."""
        wide = any(p.dtype == torch.float64 for p in self._params())
        dtype = torch.float64 if wide else torch.float32
        self._keep(ModelState(*(value.to(dtype) for value in self._model_state())))
        self._widen_search(dtype)
        if self.averages:
            self._widen_averages(dtype)

    def _show(self, update: Step) -> None:
        """Write `effective_lr` for whoever logs; a skipped step leaves the one before it."""
        shown = torch.stack([group["effective_lr"].to(update.ok.device) for group in self.param_groups])
        entries = [(group, "effective_lr") for group in self.param_groups]
        keep(entries, torch.where(update.ok, update.effective_lr, shown).unbind())

    def _init_state(self) -> None:
        fresh = [p for p in self._params() if p.grad is not None and p not in self.state]
        # Parameters that join a running model share one count of the steps before; the others need none.
        running = fresh and self.state and not self._searching
        late = {"start": self.param_groups[0]["step"].clone()} if running else {}
        for p in fresh:
            dtype = torch.promote_types(p.dtype, torch.float32)
            names = ("exp_avg", *self.buffers) if self._searching else self._entries
            zeros = {name: torch.zeros_like(p, dtype=dtype) for name in names}
            self.state[p] = zeros | self._origin_of(p) | self._first_iterates(p) | late

    def _is_state_probe(self) -> bool:
        """torch.distributed.checkpoint asks for initialised state by a step with lr 0 and zero gradients."""
        if self.state or any(float(group["lr"]) != 0 for group in self.param_groups):
            return False
        grads = [local(p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        return bool(grads) and not any(bool(g.any()) for g in grads)

    def state_dict(self) -> dict[str, Any]:
        """The state as in torch. Where parameters are sharded and in bfloat16 or float16, this is a collective: it sums
        what the last step lost by rounding, so that the state is complete.
        """
        self.search_goes_on()
        self._keep(with_drift(self._model_state(), self._movement.settle()))
        return self._with_origins(with_starts(super().state_dict(), self.param_groups[0]["step"]))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as in torch, and keep scalars and buffers in at least float32 where torch would cast them.

        Raises:
            ValueError: the state was not saved by this method.
        """
        defaults, names = {name: self.defaults[name] for name in self._option_names()}, self._entries
        state_dict = with_defaults(type(self).__name__, state_dict, defaults, names)
        check_origins(state_dict)
        super().load_state_dict(state_dict)
        self._widen()
        take_back(self.state, self._params(), state_dict, self.param_groups[0]["step"])
        self._fit_entries()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            if group.get("averaging") is True:  # saved before it had a share of its own
                group["averaging"] = self._beta(group)
        # Loading a state comes here too: old counts are no news then, and how the parameters were left is not known any
        # more. The loss of gradients that stay, and who keeps it, stay too.
        self._watch, self._movement = Watch(self.param_groups[0]), Movement()
        self._vectors = Vectors()
        self._probed = False
        self._resume_search()
        self.__dict__.setdefault("shard_group", None)


@functools.cache
def _leave_step_untraced() -> None:
    """Keep `torch.compile` out of the step; at the first optimizer, because this imports what any optimizer imports then.

    A graph around the step would hold its numbers as constants; the passes have graphs of their own (`compile`).
    """
    reason = "a step of a MoMo optimizer is not traced: compile the model, not the step"
    MomoOptimizer.step = untraced(MomoOptimizer.step, reason)
