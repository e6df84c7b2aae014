"""Where NaN and infinity come from: what every operation is given and what it returns, while a computation runs.

`Tracer` sees each operation of torch's below autograd, forward and backward alike, and keeps for the memory that holds
numbers that are not finite which operation they began with. What is not finite is followed through everything that
is computed from it, so that of a result it can be told where its own NaN came from, and not where any came from: a
model may well make infinities on purpose (a mask) that never reach anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from pullback_server.engine.not_finite import Kind, described, kinds_of, stored
from pullback_server.engine.places import Place, Places, followed, place_of
from pullback_server.engine.tripwire import nodes

#: Operations that only take memory: what it holds is no result.
_TAKE = frozenset(("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted"))
#: Operations whose first argument is written and not read.
_OVERWRITE = frozenset(
    (
        "copy_",
        "fill_",
        "zero_",
        "normal_",
        "uniform_",
        "bernoulli_",
        "random_",
        "exponential_",
        "cauchy_",
        "geometric_",
        "log_normal_",
    )
)

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Origin:
    """What NaN or infinity began with.

    number: of the event; the earlier the smaller.
    source: "given" (with the call, or in the model's weights), "operation", "backward" (a node's), "constant" (put
        there by an operation as it was told to), "unseen" (by code that is no operation of torch's).
    what: the operation, the node, or what was given. field: of the request.
    result: what exactly has it, in words. cause: the origin of the infinity (or NaN) that this was made of.
    """

    number: int
    kind: Kind
    source: Literal["given", "operation", "backward", "constant", "unseen"]
    what: str
    place: Place | None = None
    field: str = ""
    result: str = ""
    node: Any = None
    cause: Origin | None = None


def _key(tensor: torch.Tensor) -> int:
    """The address of the memory that a tensor is a view of; 0: it has none."""
    values = stored(tensor.detach())
    return 0 if values is None else values.untyped_storage().data_ptr()


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Where in its memory a tensor begins and ends, in bytes."""
    begin = int(tensor.storage_offset())
    end = begin + 1 + sum((int(size) - 1) * int(step) for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return begin * tensor.itemsize, end * tensor.itemsize


class _Part:
    """A part of some memory that was written to, and what its NaN or infinity began with."""

    def __init__(self, values: torch.Tensor, origin: Origin) -> None:
        # Memory that is known by its address must not be used again, and so is kept.
        self.values = values
        self.origin = origin
        self.begin, self.end = _span(values)

    def covers(self, other: _Part) -> bool:
        dense = (self.end - self.begin) == self.values.nbytes
        return dense and self.begin <= other.begin and other.end <= self.end

    def touches(self, begin: int, end: int) -> bool:
        """Whether some of it is there, and has not become finite since."""
        return self.begin < end and begin < self.end and self.origin.kind in kinds_of(self.values)


class _Read:
    """What an operation was given that is not finite, and the memory that it was given."""

    def __init__(self) -> None:
        self.origins: dict[Kind, list[Origin]] = {"nan": [], "inf": []}
        self.constant = False
        self.memory: set[int] = set()


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Finds origins while it is in force. `places` says which module runs."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places = Places()
        self._count = 0
        self._parts: dict[tuple[int, Kind], list[_Part]] = {}
        #: Why something could not be looked at; empty: everything could.
        self.lost = ""
        #: Memory that nothing was written to yet.
        self._raw: set[int] = set()

    def given(self, what: str, tensor: torch.Tensor, field: str = "") -> None:
        """Something that may hold NaN or infinity already."""
        for kind in kinds_of(tensor):
            self._note(tensor, Origin(self._next(), kind, "given", what, field=field))

    def origin(self, tensor: torch.Tensor, kind: Kind) -> Origin | None:
        """Where what a tensor holds came from; None: nothing that was seen."""
        parts = self._parts.get((_key(tensor), kind))
        values = stored(tensor.detach()) if parts else None
        if not parts or values is None:
            return None
        here = [one.origin for one in parts if one.touches(*_span(values))]
        return min(here, key=lambda one: one.number, default=None)

    @contextmanager
    def tracing(self) -> Iterator[Tracer]:
        """While everything that is computed is looked at."""
        original: Callable[..., Any] = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

        def run(outputs: Any, *args: Any, **kwargs: Any) -> Any:
            handles = [node.register_hook(self._after(node)) for node in nodes(outputs) if node.next_functions]
            try:
                with self.places.at(None):
                    return original(outputs, *args, **kwargs)
            finally:
                for handle in handles:
                    handle.remove()

        torch.autograd._engine_run_backward = run  # type: ignore[attr-defined, assignment]
        try:
            with followed(self.places), self:
                yield self
        finally:
            torch.autograd._engine_run_backward = original  # type: ignore[attr-defined]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        name = str(func) if schema is None else schema.name
        short = name.rpartition("::")[2]
        read = self._quietly(lambda: self._read(short, schema, args, kwargs))
        result = func(*args, **kwargs)
        if read is not None:
            written = _written(schema, args, kwargs)
            self._quietly(lambda: self._follow(name, short, read, result, written))
        return result

    def _quietly(self, look: Callable[[], T]) -> T | None:
        """Nothing that is wrong with looking is wrong with what is looked at, which a session cannot compute again."""
        try:
            return look()
        # Memory may run out, and a tensor may be of a kind that does not tell what it holds.
        except Exception as error:
            self.lost = self.lost or f"{type(error).__name__}: {error}"
            return None

    def _follow(self, name: str, short: str, read: _Read, result: Any, written: list[torch.Tensor]) -> None:
        """Notes what an operation returned or wrote that is not finite."""
        made = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
        written = [one for one in written if not any(one is other for other in made)]
        for index, tensor in enumerate((*made, *written)):
            key = _key(tensor)
            if key not in read.memory:
                # Fresh; what lay at this address before is gone.
                if short in _TAKE:
                    self._raw.add(key)
                else:
                    self._raw.discard(key)
            if short in _TAKE:
                continue
            for kind in kinds_of(tensor):
                self._note(tensor, self._made(kind, name, read, index, described(tensor, kind)))

    def _read(self, short: str, schema: Any, args: Any, kwargs: Any) -> _Read:
        found = _Read()
        ignored = {id(one) for one in _outs(schema, kwargs)}
        if short in _OVERWRITE and args:
            ignored.add(id(args[0]))
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, (float, complex)):
                found.constant |= not (math.isfinite(value.real) and math.isfinite(value.imag))
            if not isinstance(value, torch.Tensor):
                continue
            key = _key(value)
            found.memory.add(key)
            if id(value) in ignored or (key in self._raw and not self._known(key)):
                continue
            for kind in kinds_of(value):
                found.origins[kind].append(self.origin(value, kind) or self._unseen(value, kind))
        return found

    def _made(self, kind: Kind, name: str, read: _Read, index: int, result: str) -> Origin:
        """The origin of what an operation returned."""
        if read.origins[kind]:
            return min(read.origins[kind], key=lambda origin: origin.number)
        other: list[Origin] = read.origins["inf" if kind == "nan" else "nan"]
        cause = min(other, key=lambda origin: origin.number, default=None)
        place, node = self.places.now, None
        if place is None:
            node = torch._C._current_autograd_node()
        if node is not None:
            return Origin(
                self._next(), kind, "backward", node.name(), place_of(node), "", f"in its {name}, {result}", node, cause
            )
        source: Literal["constant", "operation"] = "constant" if read.constant and cause is None else "operation"
        return Origin(self._next(), kind, source, name, place, "", f"output {index}, {result}", None, cause)

    def _unseen(self, tensor: torch.Tensor, kind: Kind) -> Origin:
        place = self.places.now
        node = torch._C._current_autograd_node() if place is None else None
        what = "" if node is None else node.name()
        place = place if node is None else place_of(node)
        origin = Origin(self._next(), kind, "unseen", what, place, "", described(tensor, kind), node)
        self._note(tensor, origin)
        return origin

    def _after(self, node: Any) -> Callable[..., None]:
        """A hook for a node. It knows the node's name and place alone: else the graph would hold on to itself."""
        name, place, clean = node.name(), place_of(node), _clean(node)

        def look(gradients: Sequence[torch.Tensor | None], incoming: Sequence[torch.Tensor | None]) -> None:
            if any(one is not None and torch._C._functorch.is_legacy_batchedtensor(one) for one in gradients):
                return
            with _disable_current_modes():
                self._quietly(lambda: self._judge(name, place, clean, gradients, incoming))
            if place is not None:
                before = {one.grad_fn for one in incoming if one is not None and one.grad_fn is not None}
                self.places.mark([one for one in gradients if one is not None], place, before)

        return look

    def _judge(
        self,
        name: str,
        place: Place | None,
        clean: bool,
        gradients: Sequence[torch.Tensor | None],
        incoming: Sequence[torch.Tensor | None],
    ) -> None:
        """Which of a node's gradients has what the node made, also by code that is no operation of torch's.

        clean: whether it is code of a model's own that was left nothing but finite numbers.
        """
        node = torch._C._current_autograd_node()
        for index, gradient in enumerate(gradients):
            for kind in () if gradient is None else kinds_of(gradient):
                assert gradient is not None
                result = f"gradient {index}, {described(gradient, kind)}"
                origin = self.origin(gradient, kind)
                if origin is None:
                    known = [found for one in incoming if one is not None and (found := self.origin(one, kind))]
                    if not known:
                        known = [Origin(self._next(), kind, "backward", name, place, "", result, node)]
                    self._note(gradient, min(known, key=lambda one: one.number))
                elif origin.node is not None and origin.node is node:
                    if (
                        origin.source == "unseen"
                        and clean
                        and not any(one is not None and kinds_of(one) for one in incoming)
                    ):
                        # Its numbers left torch and came back.
                        origin.source = "backward"
                    if origin.source == "backward":
                        origin.result = result

    def _note(self, tensor: torch.Tensor, origin: Origin) -> None:
        values = stored(tensor.detach())
        if values is None:
            return
        part = _Part(values, origin)
        parts = self._parts.setdefault((_key(tensor), origin.kind), [])
        # What is written over is no longer there.
        parts[:] = [*(one for one in parts if not part.covers(one)), part]

    def _known(self, key: int) -> bool:
        return (key, "nan") in self._parts or (key, "inf") in self._parts

    def _next(self) -> int:
        self._count += 1
        return self._count


def _clean(node: Any) -> bool:
    """Whether a node's backward is code of a model's own, and everything that was left for it is finite."""
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        return False
    left = [*vars(node).values()]
    try:
        # What was packed is not unpacked for that.
        left += [raw.data for raw in node._raw_saved_tensors or ()]
    # Freed, or changed in place: its backward will say so.
    except RuntimeError:
        return False
    return not any(isinstance(one, torch.Tensor) and kinds_of(one) for one in left)


def _outs(schema: Any, kwargs: Any) -> list[Any]:
    """The arguments that are written and not read."""
    names = [] if schema is None else [one.name for one in schema.arguments if one.is_out]
    return [one for name in names for one in tree_leaves(kwargs.get(name)) if isinstance(one, torch.Tensor)]


def _written(schema: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The arguments that an operation has written to."""
    found: list[torch.Tensor] = []
    for index, argument in enumerate([] if schema is None else schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found += [one for one in tree_leaves(value) if isinstance(one, torch.Tensor)]
    return found
