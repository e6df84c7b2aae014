"""Hosted parameters mirrored as local ones, and the copies of them that the server has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from pullback import errors
from pullback._arrays import as_array
from pullback._frames import Keep, Operand
from pullback._info import ModelInfo, TensorInfo
from pullback._lineage import Ref
from pullback._model import RemoteModel
from pullback._remote_call import session_signature
from pullback._session import Session
from pullback.torch._convert import same_bits, to_torch

#: About so many elements are read at once.
_READ_AT_ONCE = 1 << 21


@dataclass
class Copy:
    """A leaf on the server. value: what it holds there, kept to tell whether a parameter has changed since."""

    ref: Ref
    value: torch.Tensor
    requires_grad: bool


class Copies:
    """The latest copy of each parameter. Safe in many threads: at worst two send the same."""

    def __init__(self) -> None:
        self._latest: dict[str, Copy] = {}

    def copy(self, session: Session, name: str, parameter: torch.Tensor, record: bool) -> tuple[Copy, Operand]:
        """A copy of the parameter as it is now, and how to name it in an op.

        Values are compared, as writing to `.data` does not change a tensor's version. One that was changed is sent
        under a new handle, since graphs that were made before need the old one.
        """
        known = self._latest.get(name)
        if known is not None and known.ref.session is session and same_bits(known.value, parameter):
            if record and known.requires_grad != parameter.requires_grad:
                known = _turned(known)
            return known, known.ref.handle
        # Sent from the copy, so that both stay the same whatever another thread does meanwhile.
        value = parameter.detach().clone(memory_format=torch.contiguous_format)
        new = Copy(Ref(session, session.new_handle()), value, parameter.requires_grad)
        return new, Keep(as_array(value, f"parameters[{name!r}]"), new.ref.handle, new.requires_grad)

    def keep(self, copies: dict[str, Copy]) -> None:
        """Uses these from now on. Only for copies that the server is known to have."""
        self._latest.update(copies)


def _turned(known: Copy) -> Copy:
    """The same values with requires_grad the other way, made on the server: what is frozen and thawed is not resent."""
    session = known.ref.session
    new = Copy(Ref(session, session.new_handle()), known.value, not known.requires_grad)
    # Neither is waited for: should one fail, the op that uses the handle says so.
    session.call("detach", {"input": known.ref.handle}, handles=[new.ref.handle])
    if new.requires_grad:
        session.call("requires_grad_", {"input": new.ref.handle}, options={"requires_grad": True}, handles=())
    return new


def mirror(root: nn.Module, session: Session, model: RemoteModel, wanted: Sequence[str], copies: Copies) -> None:
    """Gives `root` the hosted parameters that match `wanted`, under the same dotted names, with the hosted values.

    Raises BadName for a name or glob that matches none, PullbackError.
    """
    for group in _groups(_chosen(session_signature(model._caller, session), wanted)):
        names = [spec.name for spec in group]
        refs = [Ref(session, handle) for handle in session.parameters(model.name, model.version, names)]
        for name, ref, array in zip(names, refs, session.get([ref.handle for ref in refs]), strict=True):
            value = to_torch(array, torch.device("cpu"))
            copies.keep({name: Copy(ref, value.clone(), True)})
            _place(root, name, nn.Parameter(value))


def _chosen(info: ModelInfo, wanted: Sequence[str]) -> list[TensorInfo]:
    for pattern in wanted:
        if not any(fnmatchcase(spec.name, pattern) for spec in info.parameters):
            have = ", ".join(repr(spec.name) for spec in info.parameters[:20]) or "none"
            raise errors.BadName(f"model {info.name!r} has no parameter {pattern!r}; it has {have}")
    return [spec for spec in info.parameters if any(fnmatchcase(spec.name, pattern) for pattern in wanted)]


def _groups(specs: Sequence[TensorInfo]) -> Iterator[list[TensorInfo]]:
    group: list[TensorInfo] = []
    size = 0
    for spec in specs:
        elements = 1
        for extent in spec.shape or ():
            elements *= extent if isinstance(extent, int) else 1
        if group and size + elements > _READ_AT_ONCE:
            yield group
            group, size = [], 0
        group.append(spec)
        size += elements
    if group:
        yield group


def _place(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    # Straight into the registries: a hosted layer may be called what a Module has as a method ("type", "half").
    *path, last = name.split(".")
    for part in path:
        child = root._modules.get(part)
        if child is None:
            child = root._modules[part] = nn.Module()
        root = child
    root._parameters[last] = parameter
