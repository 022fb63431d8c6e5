"""How an optimizer with `lr="auto"` searches for its cap: all that the rule (`search`) knows nothing of."""

import logging
from collections.abc import MutableMapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from momo_hf.optim.buckets import sort_into_buckets
from momo_hf.optim.ramp import ORIGIN, Part, inner_products
from momo_hf.optim.scalars import scalar
from momo_hf.optim.search import (
    NOTHING,
    REASONS,
    Search,
    SearchState,
    cap_of,
    new_search,
    next_move,
    read_search,
)
from momo_hf.optim.sharding import layouts_of, local
from momo_hf.optim.watch import Watch


logger = logging.getLogger(__name__)

AUTO = "auto"
# Where the scalars of a search are in a parameter group; a group without them has an lr that was given.
KEYS = tuple(f"search_{name}" for name in SearchState._fields)


class Searching:
    """The part of an optimizer that finds its cap in the first steps, where `lr="auto"`.

    After the search parameters, momentum and buffers are as if nothing had been, and training begins with a warmup as long
    as the search. The cap is then α = lr · `search.cap`, where `lr` is 1 at first: a schedule acts on it, and groups may
    be given their shares of it. What looks at the weights sees them go back once:

    * an average of the weights (EMA) and an evaluation see the steps of the search as long as it lasts, and a training
      that ends before it has learnt nothing. Whatever else writes to parameters meanwhile is undone with them.
    * statistics that follow the weights, as BatchNorm's, are not the optimizer's, and keep what they saw until training
      has overwritten them: with the usual momentum of 0.1 within eighty steps.
    * a copy of the parameters, as large as they are, is held and saved with the state until the search is over.
    * with `averaging` there is nothing to average before: `eval()` and `train()` leave the weights as they are, and the
      average begins where the search began.

    Every step of the search decides on the device whether it was the last one, which then takes everything back. The host
    hears of it at the beginning of the next step, when the forward and backward passes are already under way, so that
    it does not wait; the gradient of that step was taken where the search began, and with it training begins.
    """

    param_groups: list[dict[str, Any]]
    state: MutableMapping[Tensor, dict[str, Tensor]]
    _watch: Watch
    _searching = False
    _verdict: "HostCopy | None" = None

    @property
    def search(self) -> Search | None:
        """The search for the cap, read from the device; None where an `lr` was given."""
        return read_search(self._search_state()) if self._searches() else None

    @property
    def searching(self) -> bool:
        """Whether the search goes on, as far as the host knows; it hears of the end with the step after the last one."""
        return self._searching

    def cap(self) -> Tensor:
        """The upper bound of the step size as it is now, the largest of the groups, 0-dim; during a search its last size."""
        state = self._model_state()
        if self._searching:
            return self._per_group("effective_lr", state.step).max()
        return self._capped(self._undecayed(self._per_group("lr", state.step)), state.step).max()

    # ---- The steps ----

    def search_goes_on(self) -> bool:
        """Whether the coming step belongs to the search; ends it where the last one was its last."""
        if self._verdict is not None:
            (ended, cap, steps), self._verdict = self._verdict.read(), None
            if ended:
                self._searching = False
                self._drop_origins()
                tell(REASONS[int(ended)], cap, int(steps))
        return self._searching

    @torch.no_grad()
    def drop_loss(self) -> None:
        loss = self._loss
        super().drop_loss()
        # With accelerate, its optimizer hears of skipped steps, and the loss is not averaged before one.
        if loss is not None and self.state and self.loss_source is None and self.search_goes_on():
            self._search_step(loss, None, skipped=True)

    def _search_step(self, loss: Tensor | float, clip_factor: Tensor | float | None, skipped: bool = False) -> None:
        """A step of the search.

        Args:
            loss: of the step.
            clip_factor: κ, or None.
            skipped: whether a loss scaler has found a gradient that is not finite.
        """
        state, group, params = self._search_state(), self.param_groups[0], self._params()
        loss = scalar(loss, state.steps)
        clip_factor = None if clip_factor is None else scalar(clip_factor, loss).clamp(max=1.0)
        places = layouts_of(params, self.shard_group)
        names = ("exp_avg", *self.buffers, ORIGIN)
        entries = {p: {ORIGIN: entry[self._origin], **entry} for p, entry in self.state.items()}
        buckets = sort_into_buckets(self.param_groups, entries, names, self._option_names(), places)
        parts = [Part(type(self), bucket, self._beta(group), state.steps + 1) for bucket in buckets]
        if skipped:
            found = loss.new_full((3,), torch.nan)
        else:
            found = inner_products(parts, self._layouts(params, places), loss)
        slope, norm, sample = found.unbind()
        state, move = next_move(
            state, loss, slope, norm, sample, lb=group["lb"], start=self.ramp_start, clip_factor=clip_factor
        )
        for part in parts:
            part.write(move)
        self._keep_search(state)
        self._verdict = HostCopy(torch.stack([state.ended, state.cap, state.steps]))
        model = self._model_state()
        self._keep(model._replace(skipped=model.skipped + (state.dropped > 0)))
        for group in self.param_groups:
            group["effective_lr"] = torch.where(move.ok, move.size, group["effective_lr"].to(move.size))
        self._keep_undecayed(move.ok)
        self._watch.after_step(self.param_groups[0])

    def _capped(self, lr: Tensor, step: Tensor) -> Tensor:
        """α of the groups for step k of training: a group's `lr` is its share of the cap that was found."""
        return lr * cap_of(self._search_state(), step) if self._searches() else lr

    # ---- The state ----

    def _searches(self) -> bool:
        """Whether the cap was found, or is to be found, by a search."""
        return KEYS[0] in self.param_groups[0]

    def _join_search(self, group: dict[str, Any]) -> None:
        """Turn `lr="auto"` of a group that is being added into what it stands for.

        Raises:
            ValueError: `lr` is another text, or some groups have a number and some have not.
        """
        lr, head = group["lr"], self.param_groups[0]
        if isinstance(lr, str) and lr != AUTO:
            raise ValueError(f'`lr` must be a number or "{AUTO}", got {lr!r}.')
        auto = lr == AUTO if isinstance(lr, str) else KEYS[0] in group
        if group is not head and auto != self._searches():
            raise ValueError(
                f'`lr` must be "{AUTO}" in all parameter groups or in none, got it and {lr if not auto else "a number"}: '
                f'the search finds one cap for all. Give "{AUTO}" to all, and the groups their shares of the cap '
                'afterwards: group["lr"] = 0.5.'
            )
        if auto:
            group["lr"] = 1.0 if isinstance(lr, str) else lr
            begun = group is not head
            self._keep_search(self._search_state() if begun else new_search(torch.zeros((), device=self._home())))
            self._searching = self._searching or not begun

    def _search_state(self) -> SearchState:
        home = self._home()
        return SearchState(*(self.param_groups[0][key].to(home) for key in KEYS))

    def _keep_search(self, state: SearchState) -> None:
        for group in self.param_groups:
            group.update(zip(KEYS, state))

    def _widen_search(self, dtype: torch.dtype) -> None:
        if self._searches():
            self._keep_search(SearchState(*(value.to(dtype) for value in self._search_state())))

    @property
    def _origin(self) -> str:
        """The entry that holds the weights from before the search. Averaging begins there, so its z serves as one."""
        return "z" if self.averages else ORIGIN

    def _origin_of(self, param: Tensor) -> dict[str, Tensor]:
        """What the state of a parameter that joins has beside buffers and iterates."""
        return {ORIGIN: param.detach().clone()} if self._searching and not self.averages else {}

    def _drop_origins(self) -> None:
        """Leave what training has: without averaging there is no origin any more, with it no momentum."""
        for entry in self.state.values():
            entry.pop("exp_avg" if self.averages else ORIGIN, None)

    def _resume_search(self) -> None:
        """Take up what a loaded state says of the search."""
        self._verdict = None
        self._searching = self._searches() and not float(self.param_groups[0]["search_ended"])
        if not self._searching:
            self._drop_origins()

    def _with_origins(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A state that has the same entries during a search and after it: the momentum stands for the origin, or z for it.

        torch.distributed.checkpoint fills the state of a fresh optimizer, which cannot know what is going to come.
        """
        if self._searches() and not self._searching:
            gone, there = ("exp_avg", "z") if self.averages else (ORIGIN, "exp_avg")
            entries = state_dict["state"]
            state_dict["state"] = {key: {**entry, gone: entry[there]} for key, entry in entries.items()}
        return state_dict


def check_origins(state_dict: dict[str, Any]) -> None:
    """Raise a ValueError if a state from the middle of a search has lost the weights from before it."""
    group = state_dict["param_groups"][0]
    if KEYS[0] not in group or float(group["search_ended"]):
        return
    for entry in state_dict["state"].values():
        names = ("z" if "z" in entry else ORIGIN, "exp_avg")
        origin, momentum = (local(entry[name]) if name in entry else None for name in names)
        if origin is None or momentum is None or (origin.numel() and origin.data_ptr() == momentum.data_ptr()):
            raise ValueError(
                "This state was saved while a search for the cap went on, and lacks the weights from before it: it was "
                "filled into the state of an optimizer whose search is over. Load it into a fresh optimizer."
            )


class HostCopy:
    """A few numbers on their way to the host, which waits for them only when it reads them."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._event = values.to("cpu", non_blocking=True), None
        if values.device.type != "cpu":
            self._event = torch.Event(values.device.type)
            self._event.record(torch.accelerator.current_stream(values.device))

    def read(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()


def tell(reason: str, cap: float, steps: int) -> None:
    """Say once what was found; on the first process."""
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    if reason == REASONS[int(NOTHING)]:
        logger.warning(
            f"search: nothing found in {steps} steps, so a cautious cap of {cap:.2g} was taken; the loss says too little "
            "about the step size. Give `lr` to choose it yourself."
        )
    else:
        logger.warning(f"search: cap {cap:.2g} found after {steps} steps ({reason}).")
