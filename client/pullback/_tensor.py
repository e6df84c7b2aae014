"""`Tensor`: an array whose graph a server holds."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from pullback import errors
from pullback._arrays import Array, as_array, is_differentiable, refuse_torch_graph, tensor_dtype
from pullback._lineage import Leaves, Ref, merged
from pullback._methods import Methods
from pullback._session import HandleInfo, Pending, Session
from pullback._transport import Transport

#: Values of at most so many bytes are kept here once they were read.
_CACHED_BYTES = 1 << 20


class Tensor(Methods):
    """A tensor on a server's worker, with the graph that made it there. It feels like torch.Tensor.

        x = pb.tensor([1.0, 2.0], requires_grad=True)
        y = model(x).pow(2).sum()
        y.backward()
        x.grad.numpy()

    Made by `pullback.tensor`, by models called on tensors, and by operations: Python's operators, indexing, and the
    methods that `dir()` lists, each as torch's of the same name. An op sends what the server does not have yet, runs
    there, and leaves its result there; values travel when they are read (small ones come along by themselves).

    Differences from torch.Tensor: dtype is numpy's; numpy() returns a copy and may be called on any tensor; a graph
    cannot be looked into (no grad_fn, no hooks).

    Errors are those of `pullback.errors`, which are also the ValueErrors and RuntimeErrors that torch would raise. When
    the session has ended, SessionLost.
    """

    __slots__ = (
        "__weakref__",
        "_data",
        "_dtype",
        "_epoch",
        "_grad",
        "_home",
        "_index",
        "_leaf",
        "_leaves",
        "_pending",
        "_ref",
        "_requires_grad",
        "_shape",
        "exposed",
        "fetches_grad",
    )

    # numpy leaves operators with an array on the left to this class.
    __array_ufunc__ = None

    _dtype: np.dtype[Any]
    _shape: tuple[int, ...]

    def __init__(self, data: Array, requires_grad: bool = False, home: Session | Transport | None = None) -> None:
        """data: belongs to the tensor from now on. Users call `pullback.tensor`."""
        if requires_grad and not is_differentiable(data):
            raise errors.NotDifferentiable(
                f"a tensor of dtype {data.dtype} cannot require grad: only floating-point and complex ones can"
            )
        self._data: Array | None = data
        self._dtype, self._shape = data.dtype, data.shape
        self._requires_grad = requires_grad
        self._leaf = True
        self._ref: Ref | None = None
        self._home = home
        self._epoch = 0
        self._pending: Pending | None = None
        self._index = 0
        self._leaves: Leaves = {}
        self._grad: Tensor | None = None
        #: Whether something may share its memory on the server.
        self.exposed = False
        #: Whether its gradient's value comes along with a backward, when it is small.
        self.fetches_grad = True

    # ---- made of answers

    @classmethod
    def _bare(cls, ref: Ref, leaves: Leaves) -> Tensor:
        kind = ref.session.tensor_type or cls
        self = kind.__new__(kind)
        self._data = self._pending = self._grad = None
        self._home = ref.session
        self._requires_grad = False
        self._leaf = False
        self._ref, self._leaves = ref, leaves
        self._epoch = self._index = 0
        self.exposed = self.fetches_grad = True
        ref.session.living[ref.handle] = self
        return self

    @classmethod
    def made(cls, info: HandleInfo, epoch: int, ref: Ref, leaves: Leaves) -> Tensor:
        """The tensor that an answer tells of."""
        self = cls._bare(ref, leaves)
        self._take(info, epoch)
        return self

    @classmethod
    def coming(cls, pending: Pending, index: int, ref: Ref, leaves: Leaves) -> Tensor:
        """The tensor that entry `index` of an answer will tell of."""
        self = cls._bare(ref, leaves)
        self._pending, self._index = pending, index
        # What it may be, for ops that are sent before it is known.
        self._requires_grad = bool(leaves)
        return self

    @classmethod
    def parameter(cls, ref: Ref, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Tensor:
        """A leaf that the session made of a hosted parameter."""
        self = cls._bare(ref, {})
        self._leaf = self._requires_grad = True
        self._dtype, self._shape = dtype, shape
        self.fetches_grad = False
        return self

    def _take(self, info: HandleInfo, epoch: int) -> None:
        if info.dtype is None:
            raise errors.ProtocolError("the server calls an output unused")
        self._dtype, self._shape = info.dtype, info.shape
        self._requires_grad = info.requires_grad
        # Outputs without a graph are leaves, as in torch.
        self._leaf = not info.requires_grad
        if not info.requires_grad:
            self._leaves = {}
        self._data, self._epoch = info.value, epoch

    def _known(self) -> None:
        """Waits for the answer that tells what this tensor is. Raises what its op failed with."""
        pending = self._pending
        if pending is not None and self._ref is not None:
            self._ref.session.settle(pending)
            self.learn()

    def learn(self) -> None:
        """Takes what the answer tells, if it is there and tells of success."""
        pending = self._pending
        if pending is not None and self._ref is not None and pending.succeeded():
            infos = pending.result()
            if self._index >= len(infos) or infos[self._index].handle != self._ref.handle:
                raise errors.ProtocolError(f"{len(infos)} outputs came, not those that were announced")
            if self._pending is pending:
                self._take(infos[self._index], pending.epoch)
                self._pending = None

    # ---- what ops ask

    @property
    def bound_session(self) -> Session | None:
        """The session that holds it, or that it was made for."""
        if self._ref is not None:
            return self._ref.session
        return self._home if isinstance(self._home, Session) else None

    @property
    def is_at_home(self) -> bool:
        """Whether `bound_session` is the session that it was made for."""
        return self._home is not None and self._home is self.bound_session

    @property
    def transport(self) -> Transport | None:
        """Of the client that it was made for."""
        return self._home if isinstance(self._home, Transport) else None

    @property
    def is_portable(self) -> bool:
        """Whether its data is here, so that any session can be given it."""
        if self._ref is None:
            return True
        return self._pending is None and self._fresh and self.is_known_leaf

    @property
    def is_known_leaf(self) -> bool:
        """`is_leaf` as far as it is known without waiting."""
        return self._leaf

    @property
    def known_dtype(self) -> np.dtype[Any] | None:
        """`dtype` where it is known without waiting."""
        return self._dtype if self._pending is None else None

    @property
    def is_here(self) -> bool:
        """Whether its value can be read without asking the server."""
        return self._pending is None and self._fresh

    @property
    def _fresh(self) -> bool:
        """Whether `_data` is the value."""
        if self._data is None:
            return False
        return self._ref is None or not self.exposed or self._epoch == self._ref.session.epoch

    def ref_in(self, session: Session) -> Ref | None:
        """What stands for it in `session`; None: nothing yet. Raises BadHandle where nothing can."""
        if self._ref is not None and self._ref.session is session:
            return self._ref
        if not self.is_portable:
            raise errors.BadHandle(f"the tensor belongs to {self.bound_session!r}, and is used in {session!r}")
        return None

    def handle_in(self, session: Session) -> int | None:
        """Its handle in `session`; None: it is not there."""
        ref = self._ref
        return ref.handle if ref is not None and ref.session is session else None

    def may_share(self, other: Tensor) -> bool:
        """Whether it shares memory with another tensor. Waits for what would tell."""
        session = self.bound_session
        if session is None or other.handle_in(session) is None:
            return False
        self._known()
        other._known()
        return session.memory.same(self.handle_in(session), other.handle_in(session))

    def portable_data(self) -> Array:
        """Its data, to be sent and not to be changed."""
        assert self._data is not None
        return self._data

    def bind(self, ref: Ref, epoch: int) -> None:
        """It is in a session now."""
        self._ref, self._epoch = ref, epoch
        ref.session.living[ref.handle] = self

    def unbind(self, ref: Ref) -> None:
        """It may not be in the session after all."""
        if self._ref is ref:
            self._ref = None

    def changed(self) -> None:
        """An in-place operation has changed it."""
        self._data = None

    def depend_on(self, leaves: Leaves) -> None:
        """An in-place operation has made it depend on these leaves. A leaf that requires grad always stays one."""
        if not (self._leaf and self._requires_grad):
            self._requires_grad, self._leaf = True, False
            self._leaves = merged([self._leaves, leaves])

    def flag(self, requires_grad: bool) -> None:
        """This leaf was told whether it requires grad."""
        self._requires_grad = requires_grad

    @property
    def leaves(self) -> Leaves:
        """The leaves that it depends on, if it is none itself."""
        return self._leaves

    @property
    def may_require_grad(self) -> bool:
        """`requires_grad`, or in a pipelined session what it may turn out to be."""
        return self._requires_grad

    # ---- what users ask

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents of its axes."""
        self._known()
        return self._shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """numpy's dtype (ml_dtypes' for bfloat16 and float8)."""
        self._known()
        return self._dtype

    @property
    def ndim(self) -> int:
        """How many axes it has."""
        return len(self.shape)

    @property
    def requires_grad(self) -> bool:
        """Whether gradients with respect to it, or through it, can be asked for."""
        self._known()
        return self._requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    @property
    def is_leaf(self) -> bool:
        """Whether it is not the result of an op that recorded a graph."""
        self._known()
        return self._leaf

    @property
    def grad(self) -> Tensor | None:
        """The gradient that backward() has accumulated; None until then."""
        return self._grad

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if value is not None:
            if not isinstance(value, Tensor):
                raise TypeError(f"grad is a {type(value).__name__}, expected a Tensor or None")
            if value.shape != self.shape:
                raise errors.BadCotangent(f"grad has shape {list(value.shape)}, the tensor has {list(self.shape)}")
        self._grad = value

    def retain_grad(self) -> None:
        """Has backward() accumulate into `.grad` though this is no leaf. Raises NotDifferentiable without graph."""
        if not self.requires_grad:
            raise errors.NotDifferentiable("retain_grad() on a tensor that does not require grad")
        if not self.is_leaf and self._ref is not None:
            self._ref.session.retained[id(self)] = weakref.ref(self)

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """Sets whether a leaf requires grad. Returns the tensor itself."""
        from pullback._apply import run_in_place

        if requires_grad == self.requires_grad:
            return self
        if not self.is_leaf:
            raise errors.NotDifferentiable("requires_grad can be changed of leaves alone; use detach()")
        if requires_grad and self._dtype.kind in "biu":
            raise errors.NotDifferentiable(f"a tensor of dtype {self._dtype} cannot require grad")
        if self._ref is not None:
            run_in_place(self, "requires_grad_", {}, {"requires_grad": bool(requires_grad)})
        self.flag(bool(requires_grad))
        return self

    def backward(
        self,
        gradient: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Tensor | Sequence[Tensor] | None = None,
    ) -> None:
        """Accumulates gradients into `.grad` of the leaves that this depends on, as torch.Tensor.backward does.

        gradient: the cotangent, of this tensor's shape; None: 1, for a tensor of one element.
        retain_graph: keep the graph for another backward; None: as create_graph.
        create_graph: make the gradients differentiable.
        inputs: the tensors to accumulate into; None: all leaves, and tensors with retain_grad().

        Raises NotDifferentiable, MissingCotangent, BadCotangent, GraphFreed, OrderUnavailable, ModifiedInPlace, ...
        """
        from pullback._backward import backward

        backward([self], [gradient], retain_graph, create_graph, inputs)

    def _value(self) -> Array:
        """Its value, not to be changed. Raises PullbackError."""
        self._known()
        if self._fresh:
            assert self._data is not None
            return self._data
        assert self._ref is not None
        session = self._ref.session
        epoch = session.epoch
        (value,) = session.get([self._ref.handle])
        if value.nbytes <= _CACHED_BYTES:
            self._data, self._epoch = value, epoch
        return value

    def numpy(self) -> Array:
        """A copy of its value. Raises PullbackError."""
        value = self._value()
        return value.copy() if value is self._data else value

    def item(self) -> Any:
        """The value of a tensor of one element, as a Python number. Raises ValueError for any other."""
        return self._number()

    def _number(self) -> Any:
        value = self._value()
        if value.size != 1:
            raise ValueError(f"a tensor of shape {list(self.shape)} is not one number")
        return value.item()

    def tolist(self) -> Any:
        """Its values as nested lists of Python numbers."""
        return self._value().tolist()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("a tensor's value cannot be had without a copy")
        value = Tensor.numpy(self)
        return value if dtype is None else value.astype(dtype)

    def __reduce__(self) -> Any:
        raise TypeError("a Tensor cannot be pickled or copied: its graph is in a session; use .numpy() or .clone()")

    def __deepcopy__(self, memo: Any) -> Tensor:
        if not self.is_leaf:
            raise TypeError("only leaves can be deep-copied, as in torch; use .clone()")
        return Tensor(Tensor.numpy(self), self.requires_grad)

    def __repr__(self) -> str:
        from pullback._repr import shown

        return shown(self)


def tensor(
    data: Any, requires_grad: bool = False, dtype: Any = None, *, session: Session | Transport | None = None
) -> Tensor:
    """A tensor with a copy of `data`, which is sent to a server with the first op that uses it.

    data: an array, a number or nested lists of numbers. Arrays keep their dtype; Python floats become float32, ints
        int64, as in torch.
    dtype: another dtype: numpy's, torch's, or a name.
    session: where, or by which client, it will be used; None: in that of the tensors or of the model it meets, else in
        that of the `with client.session():` around, else in the client's own.

    Raises TypeError (also for a torch tensor that requires grad), ValueError; NotDifferentiable for requires_grad with
    a dtype that has no gradients.
    """
    refuse_torch_graph(data, "data")
    source = data._value() if isinstance(data, Tensor) else as_array(data, "data")
    wanted = source.dtype.newbyteorder("<") if dtype is None else tensor_dtype(dtype)
    if dtype is not None and not hasattr(data, "dtype"):
        # From Python's own numbers, not from the float32 that they would have become.
        try:
            return Tensor(np.array(data, dtype=wanted, order="C"), requires_grad, session)
        except (TypeError, ValueError):
            pass
    return Tensor(np.array(source, dtype=wanted, order="C", copy=True), requires_grad, session)
