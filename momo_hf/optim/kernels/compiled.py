"""The plain passes over large tensors, through `torch.compile`."""

import functools
import operator
from collections import Counter
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from momo_hf.optim.kernels.direct import Direct
from momo_hf.optim.kernels.plain import Plain
from momo_hf.optim.method import Method
from momo_hf.optim.steps.averaged import Averaged
from momo_hf.optim.steps.kind import Access, How, Kind, Now, Tensors
from momo_hf.optim.tensors import chunks
from momo_hf.optim.tensors.buckets import Bucket
from momo_hf.optim.tensors.chunks import Piece
from momo_hf.optim.tensors.gathered import Gathered


# Tensors in one call of a compiled function; only this number and 1 occur, so that it is compiled twice and not more.
BATCH = 8
# Elements that are worth a call, which costs some tens of microseconds on a CPU, where another set is nearly as fast.
WORTH = 1 << 18
# Elements of a row. A loop over whole rows has no remainder, in numbers of elements that the compiler does not know.
ROW = 16
# Elements of a long one. Over more than 4,096 numbers in float32 the compiler sums by a cascade that it keeps in memory, which
# takes a tenth of the loop; sums over such rows, and then over these, need none.
LONG = 1 << 10


class Batch(NamedTuple):
    """What one call of a compiled function sees.

    Attributes:
        tensors: the tensors by role, of one shape: rows of single tensors, or a stack of whole ones.
        stack: the piece that a stack was read from.
        places: those of single tensors in the bucket.
        size: the number of rows.
        long: whether these are long ones.
        dtypes: of all tensors.
    """

    tensors: list[Tensors]
    stack: Piece | None = None
    places: tuple[int, ...] = ()
    size: int | None = None
    long: bool = False
    dtypes: tuple[torch.dtype, ...] = ()


class Compiled(Plain):
    """For groups with `compile`. The compiler makes one loop of each pass, which reads and writes every tensor once.

    Left to another set are tensors that are too small to be worth a call, alone or in a full batch, and the rare ones that
    have no whole number of rows.
    """

    @classmethod
    def take(cls, bucket: Bucket, finite_known: bool) -> tuple[Bucket, Bucket]:
        if not (bucket.group["compile"] and bucket.moves) or isinstance(bucket.method, Gathered):
            return bucket.empty, bucket
        if bucket.method.whole:
            return bucket.split(lambda row: row[0].numel() >= chunks.PACKED)
        counts, worth = Counter(map(Tensor.numel, bucket.roles["param"])), cls.worth()
        room = {numel: in_calls(numel, count, worth) for numel, count in counts.items()}
        own = [i for i, role in enumerate(bucket.roles) if role != "grad"]  # a gradient may be copied

        def fits(row: tuple[Tensor, ...]) -> bool:
            numel = row[0].numel()
            taken = room[numel] > 0 and all(row[i].is_contiguous() for i in own)
            room[numel] -= taken
            return taken

        return bucket.split(fits)

    @staticmethod
    def worth() -> int:
        """The number of elements that are worth a call."""
        return WORTH

    @cached_property
    def batches(self) -> list[Batch]:
        """The tensors of every call."""
        if self.method.whole:
            return [Batch([piece.read_all(piece.roles)], piece) for piece in self.pieces]
        # The paper's step is as fast with long rows as without, and the ramp, with sums of its own, slower.
        long = self.kind is Averaged and self.how.finite_known and self.bucket.device.type == "cpu"
        grads, batches = [as_rows(grad, long) for grad in self.bucket.roles["grad"]], []
        for batch in self.bucket.made(batches_in_long_rows if long else batches_in_rows):
            own = [grads[place] for place in batch.places]
            tensors = [{**roles, "grad": grad} for roles, grad in zip(batch.tensors, own)]
            batches.append(batch._replace(tensors=tensors, dtypes=(*batch.dtypes, *(grad.dtype for grad in own))))
        return batches

    def first(self) -> Tensor:
        return self._pass(self.kind.first_access(self.method, self.how), True, ())

    def second(self, numbers: tuple[Tensor, ...]) -> Tensor:
        left = self._pass(self.kind.second_access(self.method, self.how), False, numbers)
        torch.autograd.graph.increment_version(self.bucket.roles["param"])
        return left

    def _pass(self, access: Access, first: bool, numbers: tuple[Tensor, ...]) -> Tensor:
        """One pass over all batches; what a costly method keeps stays among their tensors."""
        constants, scalars = self.parted
        scalars = [*scalars, *numbers]
        constants = constants, *(number.dtype for number in numbers)
        there = self.batches[0].tensors[0]
        roles = [role for role in dict.fromkeys((*access.reads, *access.writes, "direction")) if role in there]
        # Stacks have several sizes, and a direction may be one of the arguments.
        plain = self.bucket.device.type == "cpu" and not self.method.whole and not self.method.costly
        sorts = {(len(batch.tensors), batch.long) for batch in self.batches}
        functions = {sort: compiled(self.kind, self.method, self.how, *sort, first) for sort in sorts}
        found = []
        for batch in self.batches:
            tensors = [own[role] for own in batch.tensors for role in roles] + scalars
            given = functools.partial(arguments, batch, roles, self.now, numbers)
            key, size = (constants, batch.dtypes), batch.size if plain else None
            sums, *directions = functions[len(batch.tensors), batch.long](key, size, tensors, given)
            for own, direction in zip(batch.tensors, directions):
                own["direction"] = direction
            if batch.stack is not None:
                batch.stack.write_all(batch.tensors[0], access.writes)
            found.append(sums)
        return torch.stack(found).sum(0) if len(found[0]) else found[0]

    @cached_property
    def parted(self) -> tuple[Any, list[Tensor]]:
        """What is constant to the compiler in the numbers of the step, in words, and the tensors among them."""
        now, before = self.now, self.now.options_before or {}
        named = {**now._asdict(), **now.options, **{f"{name} before": value for name, value in before.items()}}
        del named["options"], named["options_before"]
        constants = {name: value.dtype if isinstance(value, Tensor) else repr(value) for name, value in named.items()}
        return str(constants), [value for value in named.values() if isinstance(value, Tensor)]


class CompiledRest(Compiled):
    """What the sets that are written for one method leave: beside the plain passes a call is worth its price much sooner."""

    @staticmethod
    def worth() -> int:
        return chunks.PACKED


def batches_of(bucket: Bucket, long: bool) -> list[Batch]:
    """What shares a call, because that costs tens of microseconds: tensors of one size, as layers have them, without gradients."""
    roles = {role: [as_rows(t, long) for t in tensors] for role, tensors in bucket.roles.items() if role != "grad"}
    by_shape: dict[torch.Size, list[tuple[int, Tensors]]] = {}
    for i, row in enumerate(zip(*roles.values())):
        by_shape.setdefault(row[0].shape, []).append((i, dict(zip(roles, row))))
    batches = []
    for (size, *_, length), alike in by_shape.items():
        full = len(alike) - len(alike) % BATCH
        for together in [*(alike[i : i + BATCH] for i in range(0, full, BATCH)), *([one] for one in alike[full:])]:
            places, tensors = zip(*together)
            dtypes = tuple(t.dtype for own in tensors for t in own.values())
            batches.append(Batch([*tensors], places=places, size=size, long=length == LONG, dtypes=dtypes))
    return batches


batches_in_rows = functools.partial(batches_of, long=False)
batches_in_long_rows = functools.partial(batches_of, long=True)


def arguments(batch: Batch, roles: list[str], now: Now, numbers: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """What a compiled function is called with."""
    return [{role: own[role] for role in roles} for own in batch.tensors], now, numbers


def as_rows(tensor: Tensor, long: bool) -> Tensor:
    """The tensor as the compiler sees it, in long rows if it is to and can be: then with two dimensions, and otherwise with three. A
    copy where it is not contiguous. `data` drops the note which one it is a view of; the compiler would compile anew for each
    kind of view.
    """
    shape = (-1, LONG) if long and tensor.numel() % LONG == 0 else (-1, 1, ROW)
    return tensor.contiguous().view(shape).data


def in_calls(numel: int, count: int, worth: int) -> int:
    """How many of `count` tensors of one size are worth calls: all, or those that fill batches."""
    if numel % ROW or numel * BATCH < worth:
        return 0
    return count if numel >= worth else count - count % BATCH


@functools.cache
def compiled(kind: type[Kind], method: Method, how: How, count: int, long: bool, first: bool) -> Direct:
    """A pass over `count` tensors of one size, whichever it is; compiled once for each kind, method and way to do it."""
    access = kind.first_access(method, how) if first else kind.second_access(method, how)

    def run(batch: list[Tensors], now: Now, numbers: tuple[Tensor, ...]) -> list[Tensor]:
        rows, directions = [], []
        for tensors in batch:
            # To the compiler the elements of a row are a constant from here on; the number of rows is not.
            assert method.whole or all(t.size(-1) == (LONG if long else ROW) for t in tensors.values())
            # In the dtype to compute in: they are taken whole and converted in the loop, without a copy.
            wide = {role: tensors[role].to(now.weight.dtype) for role in access.reads}
            if first and long:
                # Always true, which the compiler does not see: it would write in a loop over all elements, and sum over
                # rows in another one.
                there = torch.arange(len(tensors["grad"]))[:, None] >= 0
                wide |= {role: wide[role].where(there, 0.0) for role in access.writes}
            if first:
                found = kind.first(method, wide, now, how)
                directions += [wide["direction"]] if method.costly else []
            else:
                wide |= {"direction": tensors["direction"]} if method.costly and how.moves else {}
                found = kind.second(method, wide, now, how, numbers)
            # Tensor by tensor: the compiler makes one loop only of what stands close to each other.
            rows.append(found)
            for role in access.writes:
                if wide[role] is not tensors[role]:
                    tensors[role].copy_(wide[role])
        # Stacked for each tensor, they would be written and allocated one by one.
        sums = [functools.reduce(operator.add, column) for column in zip(*rows)]
        return [torch.stack(sums) if sums else now.weight.new_zeros(0), *directions]

    options: dict[str, Any] | None = None
    if not first or how.finite_known:
        # Otherwise the compiler computes what is written a second time, in a loop of its own, for the sums over it, and
        # leaves out that a parameter rounds.
        options = {"realize_reads_threshold": 1, "emulate_precision_casts": True}
    return Direct(run, options)
