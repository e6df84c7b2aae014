"""Modules whose activations a backward computes again (torch.utils.checkpoint), and what such a module has to learn.

torch repeats a forward with what is there when the backward runs. Where that is not what the forward had found, the
derivatives would be others, so it is looked at: random numbers and buffers are as they were; a module whose arguments
or parameters were changed in the meantime keeps its activations from then on.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

_log = logging.getLogger(__name__)

_AS_IT_IS = contextlib.nullcontext()

Lesson = Callable[[], None]


class Unrepeatable(Exception):
    """A checkpointed module cannot be computed again: what it computes with is not what it was.

    learn: lets it run so that the next call's can be.
    """

    def __init__(self, learn: Lesson) -> None:
        super().__init__("what a checkpointed module computes with was changed after its forward")
        self.learn = learn


#: What the checkpointed modules of the forward that runs now may have to learn when it has run.
_forward: list[Callable[[], Lesson | None]] | None = None


@contextmanager
def repeatable() -> Iterator[None]:
    """Around the forward of a model: raises Unrepeatable, once for all of its checkpointed modules."""
    global _forward
    outer, _forward = _forward, []
    try:
        yield
        lessons = [lesson for look in _forward if (lesson := look()) is not None]
    finally:
        _forward = outer
    if lessons:

        def learn() -> None:
            for lesson in lessons:
                lesson()

        raise Unrepeatable(learn)


@dataclass
class _Learned:
    """What happened to a module that was to be checkpointed, and to all of its copies."""

    title: str
    #: It writes into its buffers.
    writes: bool = False
    #: Its activations are kept.
    kept: bool = False

    def copy_buffers(self) -> None:
        self.writes = True

    def keep(self) -> None:
        if not self.kept:
            self.kept = True
            _log.warning(
                "%s is not checkpointed any more: what it computes with (its arguments, its parameters, the buffers of "
                "others) is changed in place after it has read it",
                self.title,
            )


def recomputing(code: Any, title: str, module: nn.Module) -> Any:
    """A forward that keeps no activations, for a module and its copies."""
    learned = _Learned(title)
    draws = not all(map(_is_torchs, module.modules()))

    @functools.wraps(code)
    def forward(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        if learned.kept or not torch.is_grad_enabled():
            return code(self, *arguments, **keywords)
        if torch.compiler.is_compiling():
            return checkpoint(code, self, *arguments, use_reentrant=False, **keywords)
        buffers = [place for child in self.modules() for place in _buffers(child)]
        # What a forward does to its buffers (spectral norm, batch norm) must not reach its repetition.
        before = [tensor.clone() for _, _, tensor in buffers] if self.training or learned.writes else None
        versions = [tensor._version for _, _, tensor in buffers]
        stamps = _stamps(self, arguments, keywords, before is None)
        drawn = _numbers() if draws else None
        again = False

        def run(_: Any, *arguments: Any, **keywords: Any) -> Any:
            nonlocal again
            if not again:
                again = True
                return code(self, *arguments, **keywords)
            # torch looks at the versions of some arguments, and not of those in keywords and containers.
            if _stamps(self, arguments, keywords, before is None) != stamps:
                raise Unrepeatable(learned.keep)
            with _drawing(drawn), _AS_IT_IS if before is None else _as_before(buffers, before):
                return code(self, *arguments, **keywords)

        # checkpoint keeps the generators of the devices that it finds among the positional arguments only.
        where = next((t.new_empty(0) for t in tree_leaves(keywords) if isinstance(t, torch.Tensor)), None)
        result = checkpoint(run, where, *arguments, use_reentrant=False, preserve_rng_state=True, **keywords)
        if drawn is not None and drawn == _numbers():
            # It is large, and a graph may stay for long.
            drawn = None
        wrote = before is None and not all(
            place.get(key) is tensor and tensor._version == version
            for (place, key, tensor), version in zip(buffers, versions, strict=True)
        )

        def look() -> Lesson | None:
            if wrote:
                return learned.copy_buffers
            return learned.keep if _stamps(self, arguments, keywords, before is None) != stamps else None

        # Where there is no graph, nothing is held on to until the whole forward has run.
        if wrote or _requires_grad(result):
            if _forward is not None:
                _forward.append(look)
            elif (lesson := look()) is not None:
                raise Unrepeatable(lesson)
        return result

    return forward


def _is_torchs(module: nn.Module) -> bool:
    """Whether a module's code is torch's own, which draws from torch's generators alone."""
    own = "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
    return not own and type(module).__module__.startswith("torch.nn.")


def _requires_grad(result: Any) -> bool:
    """Whether what a module returned may have a graph."""
    tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    return not tensors or any(tensor.requires_grad for tensor in tensors)


def _stamps(module: nn.Module, arguments: Sequence[Any], keywords: Mapping[str, Any], buffers: bool) -> list[int]:
    """The versions of the tensors that a module computes with."""
    found = [leaf for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, torch.Tensor)]
    for child in module.modules():
        found += [own for own in child._parameters.values() if own is not None]
        if buffers:
            found += [own for own in child._buffers.values() if own is not None]
    # Inference tensors have none.
    return [-1 if tensor.is_inference() else tensor._version for tensor in found]


_Numbers = tuple[Any, ...]


def _numbers() -> _Numbers:
    """Where Python's and numpy's generators stand, which torch's checkpoint does not know."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return random.getstate(), (name, keys.tobytes(), *rest)  # type: ignore[union-attr]


def _set_numbers(numbers: _Numbers) -> None:
    state, (name, keys, *rest) = numbers
    random.setstate(state)
    np.random.set_state((name, np.frombuffer(keys, np.uint32), *rest))


@contextmanager
def _drawing(numbers: _Numbers | None) -> Iterator[None]:
    """Draws from where the generators stood; None: nothing is drawn."""
    if numbers is None:
        yield
        return
    now = _numbers()
    _set_numbers(numbers)
    try:
        yield
    finally:
        _set_numbers(now)


_Place = tuple[dict[str, Any], str, torch.Tensor]


def _buffers(module: nn.Module) -> Iterator[_Place]:
    for key, buffer in module._buffers.items():
        if buffer is not None:
            yield module._buffers, key, buffer


@contextmanager
def _as_before(buffers: Sequence[_Place], before: Sequence[torch.Tensor]) -> Iterator[None]:
    """While a forward runs again."""
    now = [place[key] for place, key, _ in buffers]
    try:
        for (place, key, _), tensor in zip(buffers, before, strict=True):
            # There may be more than one backward.
            place[key] = tensor.clone()
        yield
    finally:
        for (place, key, _), tensor in zip(buffers, now, strict=True):
            place[key] = tensor
