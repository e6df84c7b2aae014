"""Which hosted model put what into a session's graph.

What is proven of one model's code excuses no other's, so the nodes that a forward made are marked as its model's
before anybody else can reach them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import hooks as torch_hooks

from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.tripwire import is_foreign

#: Marks in a node's metadata. The model whose forward made it:
_OWNER = "pullback.owner"
#: that model ran on a replica;
_APART = "pullback.apart"
#: the replica itself, which must live as long as a graph that may run it again;
_REPLICA = "pullback.replica"
#: how many hooks the forward left on it;
_HOOKS = "pullback.hooks"
#: and what retained.py leaves on all that the session holds.
_NOTED = "pullback.noted"

_saved_names: dict[type, tuple[str, ...]] = {}


class Traces:
    """Sees what a forward does that its graph does not show, or not for sure.

    hooks: hooks were hung on tensors, nodes or modules, by whatever name of whatever function: each has a handle.
    packs: hooks for saved tensors were in force, as checkpoints use them.
    """

    def __init__(self) -> None:
        self.hooks = False
        self.packs = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        kind: Any = torch_hooks.RemovableHandle
        saved: Any = torch._C._autograd
        made, push = kind.__init__, saved._push_saved_tensors_default_hooks

        def make(handle: Any, hooks: Any, *, extra_dict: Any = None) -> None:
            # Hooks around forwards come with a second dictionary.
            self.hooks |= extra_dict is None
            made(handle, hooks, extra_dict=extra_dict)

        def pack(*args: Any) -> None:
            self.packs = True
            push(*args)

        kind.__init__, saved._push_saved_tensors_default_hooks = make, pack
        try:
            yield
        finally:
            kind.__init__, saved._push_saved_tensors_default_hooks = made, push


def fresh(outputs: Iterable[torch.Tensor]) -> list[Any]:
    """The nodes behind some tensors that the session does not hold yet."""
    found: list[Any] = []
    seen: set[Any] = set()
    stack = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
    while stack:
        node: Any = stack.pop()
        if node not in seen and _NOTED not in node.metadata:
            seen.add(node)
            found.append(node)
            stack.extend(following for following, _ in node.next_functions if following is not None)
    return found


def packs(node: Any) -> bool:
    """Whether a node of torch's own holds anything but tensors for its backward."""
    names = _saved_names.get(type(node))
    if names is None:
        names = _saved_names[type(node)] = tuple(name for name in dir(node) if name.startswith("_raw_saved_"))
    for name in names:
        saved = getattr(node, name)
        for one in saved if isinstance(saved, (tuple, list)) else (saved,):
            if one is not None and not isinstance(one.data, (torch.Tensor, type(None))):
                return True
    return False


def claim(hosted: HostedModel, nodes: Iterable[Any], everything: bool, hooks: bool, apart: bool) -> None:
    """Marks nodes that a forward just made: those with code that is not torch's, or everything."""
    for node in nodes:
        foreign = is_foreign(node)
        if foreign:
            hosted.met.add(type(node))
        if foreign or everything or hooks:
            marks = node.metadata
            if marks.setdefault(_OWNER, hosted) is hosted:
                if apart:
                    marks[_APART] = True
                if hooks and (count := hooks_on(node)):
                    marks[_HOOKS] = count


def keep(replica: Any, outputs: Iterable[torch.Tensor]) -> None:
    """Lets a replica live as long as the graphs that it made: they may know it by a weak reference only."""
    for tensor in outputs:
        node: Any = tensor.grad_fn
        if node is not None:
            node.metadata[_REPLICA] = replica


def owner_of(node: Any) -> HostedModel | None:
    found: HostedModel | None = node.metadata.get(_OWNER)
    return found


def adopt(node: Any, owner: HostedModel) -> None:
    """Marks a node that a model's backward made."""
    node.metadata.setdefault(_OWNER, owner)


def runs_as_it_stands(hosted: HostedModel) -> bool:
    """Whether the backward is at a node that a model made without a replica."""
    node: Any = torch._C._current_autograd_node()
    return node is not None and owner_of(node) is hosted and _APART not in node.metadata


def _nothing(*_: Any) -> None:
    pass


def hooks_on(node: Any) -> int:
    """How many hooks hang on a node; it does not list them, but a handle knows the dictionary that holds them all."""
    found = 0
    for register in (node.register_hook, node.register_prehook):
        handle = register(_nothing)
        hooks = handle.hooks_dict_ref()
        found += 0 if hooks is None else len(hooks) - 1
        handle.remove()
    return found


def hooks_of(node: Any) -> tuple[int, int]:
    """How many hooks hang on a node, and how many of them its owner had left there."""
    count = hooks_on(node)
    return count, node.metadata.get(_HOOKS, 0) if count else 0
