"""How many bytes a session keeps alive: its tensors, and what the graphs behind them saved.

Every storage that the session comes to hold is noted by a weak reference when it comes, and found gone when it goes;
who held it (a handle, a node of a graph, both) does not matter, so nothing has to be taken back when a backward frees
a graph or the last handle of one goes. A weak reference keeps a storage's header, not its bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

_Storage: Any = torch.UntypedStorage
_expired = _Storage._expired
_free = _Storage._free_weak_ref

#: Mark in a node's metadata: what it saved is noted, and so is all that lies behind it.
_NOTED = "pullback.noted"
#: With fewer storages than this, all are looked at after every op.
_FEW = 128

_saved_names: dict[type, tuple[str, ...]] = {}


def _names(kind: type) -> tuple[str, ...]:
    """The attributes of a kind of node that hold saved tensors, wrapped as SavedTensor."""
    names = tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))
    if not isinstance(kind, torch.autograd.function.FunctionMeta):
        # A class for each Python Function may come and go.
        _saved_names[kind] = names
    return names


def _tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors_in(item)]
    return []


def _of_saved(saved: Any, frames: dict[int, Any]) -> list[torch.Tensor]:
    """The tensors in a SavedTensor, or in several, and in the checkpoints that they belong to.

    frames: of checkpoints that were looked at, by id; others are added.
    """
    if isinstance(saved, (tuple, list)):
        return [tensor for item in saved for tensor in _of_saved(item, frames)]
    found: list[torch.Tensor] = []
    try:
        # torch has not always told what the hooks are.
        for value in _closed_over(getattr(saved, "unpack_hook", None)):
            if type(value).__name__ == "_CheckpointFrame" and id(value) not in frames:
                frames[id(value)] = value
                found += _of_frame(value)
        # What hooks packed is not unpacked: that might compute a checkpoint's forward anew.
        found += _tensors_in(saved.data)
    # Freed, or changed in place.
    except RuntimeError:
        pass
    return found


def _closed_over(code: Any) -> Iterator[Any]:
    for cell in getattr(code, "__closure__", None) or ():
        try:
            yield cell.cell_contents
        # Nothing was assigned yet.
        except ValueError:
            continue


def _of_frame(frame: Any) -> list[torch.Tensor]:
    """What a checkpoint (torch.utils.checkpoint, without reentrance) keeps to compute its forward anew with."""
    found = [t for given in getattr(frame, "saved_args", ()) for t in _tensors_in(getattr(given, "data", given))]
    stack, seen = [getattr(frame, "recompute_fn", None)], set()
    while stack:
        code = stack.pop()
        if id(code) in seen:
            continue
        seen.add(id(code))
        for value in _closed_over(code):
            if hasattr(value, "__closure__"):
                stack.append(value)
            else:
                found += _tensors_in(tuple(value.values()) if isinstance(value, dict) else value)
    for tensors in getattr(frame, "recomputed", {}).values():
        found += _tensors_in(list(tensors.values()))
    return found


def _saved_by(node: Any, frames: dict[int, Any]) -> Iterable[torch.Tensor]:
    kind = type(node)
    names = _saved_names.get(kind)
    if names is None:
        names = _names(kind)
    found: list[torch.Tensor] = []
    for name in names:
        try:
            saved = getattr(node, name)
        except RuntimeError:
            continue
        if saved is not None:
            found += _of_saved(saved, frames)
    variable = getattr(node, "variable", None)
    if variable is not None:
        found.append(variable)
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        # What a Function hides on ctx lives as long.
        for value in vars(node).values():
            found += _tensors_in(value)
    return found


def node_of(tensor: torch.Tensor) -> Any:
    """The node that made a tensor; None where there is no graph behind it."""
    try:
        return tensor.grad_fn
    # A view made under no_grad, and changed since: torch does not let it have a graph.
    except RuntimeError:
        return None


class Ledger:
    """The storages of one session, and their bytes."""

    def __init__(self) -> None:
        #: Address of a storage's header, which the weak reference keeps from being used again -> bytes.
        self._bytes: dict[int, int] = {}
        #: Storages of hosted models: they are there anyway.
        self._hosted: set[int] = set()
        self._total = 0
        self._changes = 0

    def exempt(self, storages: Iterable[Any]) -> None:
        """Storages that are not the session's."""
        for storage in storages:
            if storage._cdata not in self._hosted:
                self._hosted.add(storage._weak_ref())

    def is_exempt(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in memory of a hosted model."""
        return bool(self._hosted) and tensor.untyped_storage()._cdata in self._hosted

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in memory that is noted already."""
        return tensor.untyped_storage()._cdata in self._bytes

    def note(self, tensor: torch.Tensor) -> None:
        """A tensor that the session holds."""
        try:
            storage: Any = tensor.untyped_storage()
        # Sparse and other kinds without one storage.
        except (NotImplementedError, RuntimeError):
            return
        key = storage._cdata
        if key in self._bytes or key in self._hosted:
            return
        size = storage.nbytes()
        self._bytes[storage._weak_ref()] = size
        self._total += size
        self._changes += 1

    def note_graph(self, tensors: Iterable[torch.Tensor]) -> None:
        """What the graphs behind some tensors saved, as far as it is not noted yet."""
        stack: list[Any] = [node for tensor in tensors if (node := node_of(tensor)) is not None]
        frames: dict[int, Any] = {}
        note = self.note
        while stack:
            node = stack.pop()
            marks = node.metadata
            if _NOTED in marks:
                continue
            marks[_NOTED] = True
            for tensor in _saved_by(node, frames):
                note(tensor)
            for following, _ in node.next_functions:
                if following is not None:
                    stack.append(following)

    def dropped(self, count: int) -> None:
        """That so many tensors or graphs may have gone."""
        self._changes += count

    @property
    def bound(self) -> int:
        """At least the bytes held."""
        return self._total

    def settle(self) -> int:
        """Looks which storages are gone; the bytes of those that are not."""
        gone = [key for key in self._bytes if _expired(key)]
        for key in gone:
            self._total -= self._bytes.pop(key)
            _free(key)
        self._changes = 0
        return self._total

    def total(self) -> int:
        """The bytes held. Where there are many storages, those that went since the last look may be among them."""
        if len(self._bytes) <= _FEW or self._changes * 4 >= len(self._bytes):
            return self.settle()
        return self._total

    def close(self) -> None:
        for key in self._bytes:
            _free(key)
        for key in self._hosted:
            _free(key)
        self._bytes.clear()
        self._hosted.clear()
        self._total = 0

    def __del__(self) -> None:
        self.close()
