"""The state of an optimizer as a whole: begun, emptied, copied, saved and loaded."""

from collections.abc import Mapping
from typing import Any, ClassVar
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer

from momo_hf.optim.auto import STAND_IN, Choice, drop_cap, stand_in_of
from momo_hf.optim.checkpoints import SCALARS, completed, restore, with_defaults
from momo_hf.optim.checks import check_plain
from momo_hf.optim.method import Method
from momo_hf.optim.rates import Rates
from momo_hf.optim.record import SHARED_OPTIONS, beta_of, params_of
from momo_hf.optim.state import join, widen
from momo_hf.optim.steps.averaged import Averaged, form_of, others_share_of
from momo_hf.optim.steps.model import with_drift
from momo_hf.optim.steps.modelled import MODEL, Modelled
from momo_hf.optim.steps.ramp import SEARCH, Ramp, resume_ramp
from momo_hf.optim.steps.search import AUTO
from momo_hf.optim.steps.verdict import Verdict
from momo_hf.optim.upkeep import drop_empty, reset
from momo_hf.optim.watch import Watch


# All that there are; what saves a model looks for those that average its weights.
LIVING: "WeakSet[Stateful]" = WeakSet()


class Stateful(Optimizer):
    """The part of an optimizer that keeps its state, for any methods."""

    methods: ClassVar[Mapping[str, Method]]
    shard_group: dist.ProcessGroup | None

    def check_options(self, group: dict[str, Any]) -> None:
        """Raise a ValueError for a group whose options are wrong."""
        raise NotImplementedError

    @property
    def averages(self) -> bool:
        """Whether the iterates are averaged."""
        return bool(self.param_groups) and bool(self.param_groups[0].get("averaging", False))

    def _option_names(self) -> tuple[str, ...]:
        # Unpickling adds torch's own "differentiable" to the defaults, but not to the groups.
        return tuple(name for name in self.defaults if name != "differentiable")

    # ---- A new one ----

    def _begin_anew(self) -> None:
        """Forget what is not in the state: how the last step left the parameters, and what is on its way to the host."""
        LIVING.add(self)
        self._modelled, self._averaged, self._ramp = Modelled(), Averaged(), Ramp(self.methods)
        self._rates = Rates(others_share_of(self.methods))
        self._verdict: Verdict | None = None
        self._searching = False
        # Whether the state was made for torch.distributed.checkpoint, perhaps before the weights were loaded.
        self._probed = False
        # For parameters of which dtypes, and in which phase, the state is as it has to be; a loaded one may come of others.
        self._fits: tuple[bool, list[torch.dtype]] | None = None

    def _heed(self) -> None:
        """Take in that the state was emptied: then this is a new optimizer."""
        if not drop_empty(self.state):
            self._begin_anew()
            self._watch = Watch()
            self._searching = SEARCH.stands_in(self.param_groups[0])
            drop_cap(self.param_groups, stand_in_of(type(self)))
            reset(self.param_groups, form_of(self.methods))

    # ---- Copied, saved and loaded ----

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; it joins the running model of the others, whose options it has where all must agree.

        What the scalars of another group were, in a copy of it, is left behind, and so are the places of its embeddings.
        """
        copied = not param_group.keys().isdisjoint(SCALARS)
        left_behind = {*SCALARS, "tables", "embeddings"} if copied else SCALARS
        options = {name: value for name, value in param_group.items() if name not in left_behind}
        shared = self.param_groups[0] if self.param_groups else {}
        if SEARCH.stands_in(shared):
            options.setdefault("lr", AUTO)
        super().add_param_group({**{name: shared[name] for name in SHARED_OPTIONS if name in shared}, **options})
        try:
            check_plain({f"parameter {i} of the group": p for i, p in enumerate(self.param_groups[-1]["params"])})
            stand_in = stand_in_of(type(self))
            begins = join(self.param_groups, self.check_options, form_of(self.methods), stand_in)
        except ValueError:
            self.param_groups.pop()
            raise
        self._searching = begins or self._searching

    def state_dict(self) -> dict[str, Any]:
        """The state as in torch. Where parameters are sharded and in bfloat16 or float16, this is a collective: it sums
        what the last step lost by rounding, so that the state is complete.
        """
        self._heed()
        return completed(super().state_dict(), self.state, self._carried(), self.averages)

    def __getstate__(self) -> dict[str, Any]:
        self._heed()
        carried = self._carried()
        return {**super().__getstate__(), "param_groups": [group | carried for group in self.param_groups]}

    def _carried(self) -> dict[str, Tensor]:
        """What the groups have in a copy: the drift with everything that is on its way, and <d, x>, NaN if nobody knows."""
        model, movement = MODEL.read(self.param_groups), self._modelled.movement
        moved, left = movement.at_rest(params_of(self.param_groups), self.state)
        drift = with_drift(with_drift(model, movement.unsettled()), moved).drift
        return {"drift": drift, "left": torch.full_like(drift, torch.nan) if left is None else left}

    def _take_up(self, left: Tensor | None) -> None:
        """Follow the parameters from <d, x> as `_carried` gave it."""
        known = None if left is None or left.isnan() else left.to(self.param_groups[0]["drift"])
        self._modelled.movement.take_up(params_of(self.param_groups), self.state, known)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as in torch, and keep scalars and buffers in at least float32 where torch would cast them.

        Raises:
            ValueError: the state was not saved by this method.
        """
        defaults = {name: self.defaults[name] for name in self._option_names()}
        state_dict = with_defaults(type(self).__name__, state_dict, defaults, self.methods)
        choice = Choice(self.param_groups, fresh=not self.state)
        super().load_state_dict(state_dict)
        widen(self.param_groups)
        restore(self.param_groups, self.state, state_dict)
        self._take_up(state_dict["param_groups"][0].get("left"))
        choice.meet(self.param_groups)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            if group.get("averaging") is True:  # saved before it had a share of its own
                group["averaging"] = beta_of(group)
            if group.get("averaging", False):  # saved when these were 1 for good
                group.setdefault("averaging_power", 1)
                group.setdefault("polyak_factor", 1.0)
            if SEARCH.stands_in(group):  # saved when it was 1 for good
                group.setdefault(STAND_IN, 1.0)
        # Loading a state comes here too: the loss of gradients that stay, and who keeps it, stay too.
        self._begin_anew()
        self._watch = Watch(self.param_groups[0])
        head = self.param_groups[0]
        self._searching = SEARCH.stands_in(head) and not float(head["search_ended"])
        if SEARCH.stands_in(head):
            resume_ramp(self.state, self._searching, self.averages)
        self.__dict__.setdefault("shard_group", None)
        self._take_up([group.pop("left", None) for group in self.param_groups][0])
