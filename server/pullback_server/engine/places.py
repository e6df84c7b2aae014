"""Which module of a model made a node of a graph, and which one runs just now.

While a forward is followed, every call of a module passes through here: the nodes behind what it is given were made
by whoever calls it, those that are new behind what it returns by itself. A node's place is kept in its metadata, so
that a backward that comes much later still knows it. The modules themselves are left alone: it is `nn.Module.__call__`
that is another one for a while, as hooks on modules would make their forward another path through torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from pullback_server.engine.hosted import HostedModel

#: Mark in a node's metadata.
_PLACE = "pullback.place"
#: What retained.py leaves on all that a session holds: no forward of now has made it.
_NOTED = "pullback.noted"
#: What torch.compile puts between a module and those inside it.
_COMPILED = "_orig_mod."
_ROOTS = {
    "pt2": "its graph (a .pt2 file has no modules)",
    "torchscript": "its TorchScript",
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where something was computed. owner: the model and version; path: of a module, empty for the model itself."""

    owner: str
    path: str = ""
    #: What to say instead of a path: "its own code", "the loss 'mse_loss'".
    root: str = "its own code"

    def __str__(self) -> str:
        return f"module {self.path!r}" if self.path else self.root


def owner_of(hosted: HostedModel) -> str:
    """The model and its version, for a sentence."""
    return f"{hosted.owner} version {hosted.registration.id}"


def place_of(node: Any) -> Place | None:
    """Where a node of a graph was made; None: by no forward that was followed."""
    found: Place | None = node.metadata.get(_PLACE)
    return found


class Places:
    """Follows forwards. `stack`: where things are computed just now, innermost last."""

    def __init__(self) -> None:
        self.stack: list[Place | None] = []
        self._paths: dict[int, Place] = {}
        #: Nodes that were there before the forward, and through which nothing new is reached.
        self._before: set[Any] = set()

    @property
    def now(self) -> Place | None:
        """Where something that happens now happens; None: in no model."""
        return self.stack[-1] if self.stack else None

    @contextmanager
    def at(self, place: Place | None) -> Iterator[None]:
        """While something is computed there."""
        depth = len(self.stack)
        self.stack.append(place)
        try:
            yield
        finally:
            # A recomputation that stops early leaves by an exception of its own.
            del self.stack[depth:]

    @contextmanager
    def following(self, hosted: HostedModel, code: Any, given: Any) -> Iterator[Callable[[Any], None]]:
        """Around a forward. code: what is called, the hosted module or a copy of it. given: its arguments.

        What it yields is to be told what the forward returned.
        """
        root = Place(owner_of(hosted), "", _ROOTS.get(hosted.registration.source, "its own code"))
        if isinstance(code, nn.Module):
            for path, child in code.named_modules():
                path = f"{path}.".replace(_COMPILED, "").removesuffix(".")
                self._paths.setdefault(id(child), Place(root.owner, path, root.root))
        self._before = {one.grad_fn for one in _tensors(given) if one.grad_fn is not None}
        with self.at(root):
            yield lambda result: self.mark(result, root)

    def mark(self, result: Any, place: Place, before: set[Any] | None = None) -> None:
        """Says of the nodes behind some tensors, as far as nothing is known of them yet, where they were made."""
        before = self._before if before is None else before
        waiting = [one.grad_fn for one in _tensors(result) if one.grad_fn is not None]
        while waiting:
            node: Any = waiting.pop()
            if node in before:
                continue
            marks = node.metadata
            if _PLACE not in marks and _NOTED not in marks:
                marks[_PLACE] = place
                waiting.extend(following for following, _ in node.next_functions if following is not None)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """While modules that are called are noticed."""
        original: Callable[..., Any] = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            outer = self.now
            inner = self._paths.get(id(module), outer)
            if outer is not None:
                self.mark((args, kwargs), outer)
            if inner is None:
                return original(module, *args, **kwargs)
            with self.at(inner):
                result = original(module, *args, **kwargs)
            self.mark(result, inner)
            return result

        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    return (one for one in tree_leaves(values) if isinstance(one, torch.Tensor))


Tell = Callable[[Any], None]
_active: list[Places] = []


def _nothing(_: Any) -> None:
    pass


_UNWATCHED = contextlib.nullcontext(_nothing)


@contextmanager
def followed(places: Places) -> Iterator[Places]:
    """While every forward of a model is followed by these."""
    _active.append(places)
    try:
        with places.in_force():
            yield places
    finally:
        _active.pop()


def inside(hosted: HostedModel, code: Any, given: Any, notes: bool = False) -> contextlib.AbstractContextManager[Tell]:
    """Around a model's forward; costs nothing where nobody follows it. What it yields is told the forward's result.

    notes: follow it in any case, so that its nodes are known later.
    """
    if _active:
        return _active[-1].following(hosted, code, given)
    return _noted(hosted, code, given) if notes else _UNWATCHED


@contextmanager
def _noted(hosted: HostedModel, code: Any, given: Any) -> Iterator[Tell]:
    with followed(Places()) as places, places.following(hosted, code, given) as tell:
        yield tell


def in_loss(hosted: HostedModel, name: str, notes: bool = False) -> contextlib.AbstractContextManager[Tell]:
    """Around a loss, as `inside`."""
    if not _active and not notes:
        return _UNWATCHED
    return _in_loss(_active[-1] if _active else Places(), Place(owner_of(hosted), "", f"the loss {name!r}"))


@contextmanager
def _in_loss(places: Places, place: Place) -> Iterator[Tell]:
    with places.at(place):
        yield lambda result: places.mark(result, place)
