"""What a kind of step is: what is summed in the first pass, how the scalars decide, and what the second pass writes."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from momo_hf.optim.method import Method, Options
from momo_hf.optim.record import Group
from momo_hf.optim.steps.given import Beginning, Given
from momo_hf.optim.tensors.buckets import Bucket
from momo_hf.optim.tensors.sharding import Layout


class How(NamedTuple):
    """What the passes over a bucket do, in Python's values: constants to a compiler.

    Attributes:
        moves: whether there are gradients; without, averages decay and parameters stay.
        decays: whether there is weight decay.
        divide: whether the decay is proximal.
        finite_known: whether it was decided before the first pass whether loss and gradients are finite, that is,
            `now.inputs_valid` is given. Then the first pass writes averages and buffers, and otherwise the second.
        stored: the dtype of the parameters.
        interpolation: β of y, with averaging.
        bound: of the entries of u with averaging, for tables of embeddings, or None.
    """

    moves: bool
    decays: bool
    divide: bool
    finite_known: bool
    stored: torch.dtype
    interpolation: float
    bound: float | None


class Now(NamedTuple):
    """Numbers of a step for the parameters of a bucket: 0-dim, on their device, in the dtype to compute in; or Python's, for a
    kernel set that reads them.

    Attributes:
        step: k; parameters that joined a running model have had fewer steps.
        weight: 1-β_k.
        correction: 1/ρ_k, or None where it is 1; in a loop over elements a division takes much longer than a product.
        options: the method's hyperparameters, and what it derives from k.
        inputs_valid: whether loss and gradients are finite, bool; None where nobody knows yet.
        correction_before: 1/ρ_{k-1}, for kinds that look back, or None.
        options_before: the options of step k-1, likewise.
    """

    step: Tensor
    weight: Tensor
    correction: Tensor | None
    options: Options
    inputs_valid: Tensor | None
    correction_before: Tensor | None = None
    options_before: Options | None = None


# One flat tensor, or a stack of whole ones, per role, in the dtype to compute in.
Tensors = dict[str, Tensor]


class Access(NamedTuple):
    """The roles that a pass reads and those that it writes."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]


class Kind(ABC):
    """A kind of step. The passes are functions of the class, and see one piece of memory at a time; what a step of this
    kind remembers beyond the parameter groups is in the object.

    `driver.take_step` calls `begin`, `beside`, `first` for all buckets that move, `decide`, `numbers` and `second` for all
    buckets, and `finish`. The passes here define the step; a kernel set may do the same faster, see `kernels.table`.

    A step is a transaction: it writes all, or nothing where loss or gradients were not finite.

    Attributes:
        SUMS: the names of the numbers that the first pass returns for a piece.
        LEFT: those that the second pass returns.
        looks_back: whether the passes need the numbers of the step before.
        moves_all: whether parameters that have no gradient move on, as with one of 0.
        plan: the `Plan` of the last step.
    """

    SUMS: ClassVar[tuple[str, ...]]
    LEFT: ClassVar[tuple[str, ...]] = ()
    looks_back: ClassVar[bool] = False
    moves_all: ClassVar[bool] = False
    plan: Any = None

    # ---- The parameters ----

    @staticmethod
    @abstractmethod
    def roles(method: Method) -> tuple[str, ...]:
        """The entries of a parameter's state that the passes work on; where one is missing, the parameter stands for it."""

    @staticmethod
    @abstractmethod
    def first_access(method: Method, how: How) -> Access:
        """What the first pass reads and writes."""

    @staticmethod
    @abstractmethod
    def second_access(method: Method, how: How) -> Access:
        """What the second pass reads and writes."""

    @staticmethod
    @abstractmethod
    def first(method: Method, tensors: Tensors, now: Now, how: How) -> tuple[Tensor, ...]:
        """First pass over a piece of a bucket that moves: the sums over it. What it writes it changes in place or puts in
        the place of what was read; a costly direction is put beside them, as "direction".
        """

    @staticmethod
    @abstractmethod
    def second(
        method: Method, tensors: Tensors, now: Now, how: How, numbers: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Second pass over a piece: writes as the first one does, and returns what `LEFT` names.

        Args:
            method: the method.
            tensors: what it reads, and the "direction" that the first pass has kept.
            now: as in the first pass.
            how: as in the first pass.
            numbers: from `numbers`.
        """

    # ---- The scalars ----

    @abstractmethod
    def begin(self, groups: list[Group], given: Given, norm: Tensor | None) -> Beginning:
        """Begin a step.

        Args:
            groups: the parameter groups.
            given: what the step is given.
            norm: 0-dim, not finite where the gradients are not; None where nobody has looked.
        """

    def beside(
        self, params: list[Tensor], buckets: list[Bucket], layouts: Mapping[Layout | None, bool], like: Tensor
    ) -> dict[Layout | None, Tensor]:
        """What else is to be summed over the shards of every layout, from before the first pass: a scalar like `like` each,
        0 mostly.
        """
        return {layout: torch.zeros_like(like) for layout in layouts}

    @abstractmethod
    def decide(self, groups: list[Group], given: Given, beginning: Beginning, sums: Tensor, beside: Tensor) -> Any:
        """From the sums over all parameters to the step: writes the scalars of the groups.

        Args:
            groups: the parameter groups.
            given: what the step is given.
            beginning: from `begin`.
            sums: shape (len(SUMS), entries of `Given.lr`).
            beside: the sum of what `beside` gave, 0-dim.

        Returns:
            A NamedTuple with `factor`, the step sizes, shaped as `Given.lr` or 0-dim, and `accepted`, 0-dim bool, at least; in
            tensors or in Python's numbers, see `arithmetic`.
        """

    @staticmethod
    @abstractmethod
    def numbers(update: Any, bucket: Bucket, now: Now) -> tuple[Tensor, ...]:
        """What the second pass over a bucket is given of the step: numbers and flags, in tensors or Python's as `update` is."""

    def finish(  # noqa: B027 - most kinds have nothing to do
        self,
        groups: list[Group],
        params: list[Tensor],
        left: dict[Layout | None, Tensor],
        layouts: Mapping[Layout | None, bool],
    ) -> None:
        """End a step.

        Args:
            groups: the parameter groups.
            params: all parameters, in their order.
            left: for every layout what `LEFT` names, over this process's part of the parameters, shape (len(LEFT),).
            layouts: every layout, and whether it has parameters that round.
        """
