"""How an operator lets a model run: under autocast, and with activations that the backward computes again."""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from pullback_server.faults import listed
from pullback_server.hosting import Registration
from pullback_server.hosting.loading import LoadError

_log = logging.getLogger(__name__)

_AS_IT_IS = contextlib.nullcontext()
#: What torch.compile puts between a module and those inside it.
_COMPILED = "_orig_mod"


def autocast_dtype(registration: Registration, device: torch.device) -> torch.dtype | None:
    """What the forward is cast to. Raises LoadError where the device cannot."""
    name = registration.options.autocast
    if name is None:
        return None
    dtype: torch.dtype = getattr(torch, name)
    try:
        # torch only warns where it cannot, and goes on without.
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            with autocast(dtype, device):
                pass
    except (RuntimeError, UserWarning) as error:
        raise LoadError(f"model {registration.name!r}: there is no autocast to {name} on {device}: {error}") from error
    return dtype


def autocast(dtype: torch.dtype | None, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Around a forward, and not around a backward; None: nothing.

    Without torch's cache, which would hand one call the casts of another's parameters.
    """
    return _AS_IT_IS if dtype is None else torch.autocast(device.type, dtype, cache_enabled=False)


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


def checkpoint_modules(registration: Registration, module: nn.Module) -> None:
    """Lets the forwards of the modules that the options name run under torch.utils.checkpoint.

    Of modules within one another the outermost, for what is inside is computed again with it. Names, and what else
    there is to see of a module, stay: it becomes one of a subclass, of which a deep copy is one as well.

    Raises LoadError.
    """
    globs = registration.options.checkpoint
    if not globs:
        return
    owner = f"model {registration.name!r}"
    known = _named(module)
    chosen: dict[str, nn.Module] = {}
    for glob in globs:
        matching = {name: child for name, child in known.items() if fnmatchcase(name, glob)}
        running = {name: child for name, child in matching.items() if type(child).forward is not nn.Module.forward}
        if not matching:
            raise LoadError(f"{owner}: checkpoint={glob!r} matches no module; it has {listed(known) or 'none'}")
        if not running:
            raise LoadError(
                f"{owner}: checkpoint={glob!r} matches {listed(matching)}, which is only a list of others; "
                f"for those say {next(iter(matching)) + '.*'!r}"
            )
        chosen |= running
    for name, child in chosen.items():
        if not any(name.startswith(f"{other}.") for other in chosen):
            _let_recompute(owner, name, child)


def _named(module: nn.Module) -> dict[str, nn.Module]:
    """The modules inside one, by name; those that torch.compile made, by what they are made of."""
    found = {}
    for path, child in module.named_modules():
        name = ".".join(part for part in path.split(".") if part != _COMPILED)
        if name and not hasattr(child, _COMPILED):
            found[name] = child
    return found


def _let_recompute(owner: str, name: str, module: nn.Module) -> None:
    kind = type(module)
    why = ""
    if isinstance(module, torch.jit.ScriptModule):
        why = "it is TorchScript"
    elif "forward" in vars(module):
        why = "its forward is not its class's, but its own"
    else:
        try:
            own = {
                "forward": _recomputing(kind.forward, f"{owner}: its module {name!r}"),
                "__module__": kind.__module__,
                "__doc__": kind.__doc__,
            }
            made = types.new_class(kind.__name__, (kind,), exec_body=lambda namespace: namespace.update(own))
            # Not by nn.Module's own, which the class may have overridden.
            object.__setattr__(module, "__class__", made)
        # Its class may have a say in what subclasses it has.
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
    if why:
        raise LoadError(f"{owner}: its module {name!r} cannot be checkpointed: {why}")


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


def _recomputing(code: Any, title: str) -> Any:
    """A forward that keeps no activations."""
    learned = _Learned(title)

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
        drawn: _Numbers | None = _numbers()
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
        if drawn == _numbers():
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
