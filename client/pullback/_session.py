"""`Session`: ops on tensors that a server's worker holds, and the answers to them."""

from __future__ import annotations

import contextvars
import copy
import json
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pullback import errors
from pullback._arrays import Array
from pullback._frames import FrameReader, FrameWriter, HandleInfo, Keep, Operand
from pullback._loss import Loss
from pullback._memory import Memory
from pullback._pending import Pending
from pullback._request import set_mode
from pullback._stream import Reply, Stream
from pullback._transfers import CHUNK_THRESHOLD
from pullback._transport import Transport
from pullback_wire.v1 import function_pb2
from pullback_wire.v1 import session_service_pb2 as pb

if TYPE_CHECKING:
    from pullback._info import ModelInfo
    from pullback._tensor import Tensor

__all__ = ["HandleInfo", "Keep", "Pending", "Session", "current"]

#: A thread, or a task.
Who = TypeVar("Who")

#: Handles reserved for a call that does not know how many outputs it will make.
BLOCK = 65536
#: Ops that may wait for their answers before another has to wait for the first of them.
_IN_FLIGHT = 256
_EVERYTHING = 1 << 62
#: Seconds after which a session that was not heard of is asked whether it lives, and for the answer. A server that
#: shuts down ends sessions that were quiet for as long.
_STALE, _PATIENCE = 2.0, 10.0

#: What a call runs: a hosted model, a loss alone, or a tensor operation by name.
Callee = function_pb2.Function | Loss | str

#: The session of the innermost `with client.session():` of this thread (or task).
current: contextvars.ContextVar[Session | None] = contextvars.ContextVar("pullback_session", default=None)


class Session:
    """A session with a server: tensors and graphs on one worker of it, for as long as the session lasts.

        with client.session() as session:
            x = session.tensor(array, requires_grad=True)
            ...

    Made by `Client.session`; tensors get their client's own session where none is given. In its `with` block a session
    is the current one, in which tensors without a session are used; at its end it is closed, and everything that it
    held on the server is freed. One that is collected, or whose process ends, frees it all as well.

    pipelined: ops do not wait for their answers. A failure is raised by the next call that waits, which reading a value
    or a shape does, and at the latest at the end of the `with` block; its message says which op failed.

    Safe to use from many threads. It does not survive a fork: in the child it raises SessionLost. Not picklable.
    """

    def __init__(
        self,
        transport: Transport,
        models: Sequence[tuple[str, str]] = (),
        *,
        pipelined: bool = False,
        timeout: float | None = None,
    ) -> None:
        self.transport = transport.line()
        self.pipelined = pipelined
        self._timeout = timeout
        self._numbers = threading.Lock()
        self._next = 1
        #: Ops of a pipelined session that nobody has asked about yet.
        self._unseen: deque[Pending] = deque()
        #: What was current before each `with` of this session, by thread.
        self._around: dict[int, list[Session | None]] = {}
        #: Parameters that were taken, by model and version: later calls of the model use them.
        self.model_parameters: dict[tuple[str, str], dict[str, Tensor]] = {}
        #: Signatures by model and version, as they were when the session first used them.
        self.signatures: dict[tuple[str, str], ModelInfo] = {}
        #: Tensors that keep their grad though they are no leaves, by id.
        self.retained: dict[int, weakref.ref[Tensor]] = {}
        #: Leaves that were written into other tensors in place, where a graph may lead without the client's knowledge
        #: (two outputs of a model may be one tensor).
        self.written: dict[int, weakref.ref[Tensor]] = {}
        #: Tensors of this process by their handles here.
        self.living: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self._stream = _open(self.stream_type, self.transport, models, self.deadline(None))

    def __repr__(self) -> str:
        state = "" if self._stream.usable else ", over"
        return f"<pullback.Session {self.id} on {self._stream.opened.device} of {self._stream.target}{state}>"

    def __reduce__(self) -> Any:
        raise TypeError("a session cannot be pickled: it is a connection to one worker; open one where it is needed")

    # ---- what it is

    @property
    def id(self) -> str:
        """The server's name for the session, as it stands in the server's log."""
        return self._stream.opened.session_id

    @property
    def device(self) -> str:
        """Device of its worker, e.g. "cuda:0"."""
        return self._stream.opened.device

    @property
    def budget_bytes(self) -> int:
        """Bytes that its tensors and graphs may hold on the worker."""
        return self._stream.opened.budget_bytes

    @property
    def usable(self) -> bool:
        """False once it is known to have ended."""
        return self._stream.usable

    def is_alive(self) -> bool:
        """`usable`, having asked the server where it was not heard of for a while."""
        if self.usable and self._stream.unheard_for > _STALE:
            reply = Reply("session")
            try:
                self._stream.send(pb.SessionRequest(release_only=pb.ReleaseOp()), (), reply)
                self._stream.wait(reply.is_done, reply.what, min(self.deadline(None), time.monotonic() + _PATIENCE))
            except errors.PullbackError:
                return False
        return self.usable

    @property
    def going_away(self) -> bool:
        """Whether the server has said that it will end the session soon."""
        return bool(self._stream.go_away)

    @property
    def epoch(self) -> int:
        """How many ops have changed tensors in place. A value from an earlier epoch may be out of date."""
        return self._stream.epoch

    @property
    def memory(self) -> Memory:
        """Which of its handles share memory, as far as answers have come."""
        return self._stream.memory

    def deadline(self, timeout: float | None) -> float:
        """When an op that begins now has run out of time, on the time.monotonic clock."""
        return self.transport.deadline(self._timeout if timeout is None else timeout)

    # ---- how it waits

    #: What its tensors are made of; None: `Tensor`.
    tensor_type: ClassVar[type[Tensor] | None] = None
    stream_type: ClassVar[type[Stream]] = Stream

    def must_wait(self, what: str, instead: str) -> None:
        """Asked before an op is sent whose answer is waited for at once. May refuse: `instead` says what to do."""

    def make_room(self, what: str) -> None:
        """Waits while too many ops are in flight for another one."""
        if self._stream.in_flight >= _IN_FLIGHT:
            self._stream.wait(self._has_room, what, self.deadline(None))

    def _has_room(self) -> bool:
        return self._stream.in_flight < _IN_FLIGHT

    # ---- ops

    def new_handle(self, count: int = 1) -> int:
        """The first of `count` numbers that were never used in this session."""
        # Before the lock, which may be held for ever in a forked child.
        self._stream.check("")
        with self._numbers:
            first = self._next
            self._next += count
        return first

    def put(self, array: Array, requires_grad: bool = False, handle: int | None = None) -> int:
        """Stores an array as a leaf, without waiting for the answer. Returns its handle."""
        handle = self.new_handle() if handle is None else handle
        writer = FrameWriter(self._stream, "put", self.deadline(None))
        op = pb.PutOp(tensors=[writer.tensor("", array)], handles=[handle], requires_grad=[requires_grad])
        self._submit(pb.SessionRequest(put=op), writer, "put")
        return handle

    def call(
        self,
        callee: Callee,
        inputs: Mapping[str, Operand],
        *,
        targets: Mapping[str, Operand] | None = None,
        parameters: Mapping[str, Operand] | None = None,
        options: Mapping[str, Any] | None = None,
        handles: Sequence[int] | None = None,
        train: bool = False,
        seed: int | None = None,
        no_grad: bool = False,
        max_order: int | None = None,
        fetch_below: int = 0,
        fetch: bool = False,
        changes: bool = False,
    ) -> Pending:
        """Runs a function and keeps its graph.

        callee: a Function of a hosted model (with or without a loss), a `pullback.Loss` (its options go along, its
            tensors go in `targets`), or the name of a tensor operation.
        inputs, targets, parameters: arguments by name: handles, arrays, or arrays that are kept.
        options: of a tensor operation, as JSON takes them; see pullback_wire.operations.
        train, seed: for a model: run as after module.train(); of the random numbers, one being drawn in train mode.
        handles: for the outputs; None: as many as it makes, from a block of their own.
        max_order: the highest order of derivative that will be asked for; None: any.
        fetch_below: outputs of at most so many bytes come back in the answer; fetch: all do.
        changes: it is an in-place operation, which makes no handle.
        """
        what = callee if isinstance(callee, str) else callee.name if isinstance(callee, Loss) else callee.model
        writer = FrameWriter(self._stream, what, self.deadline(None))
        op = pb.CallOp(
            inputs=writer.operands(inputs),
            targets=writer.operands(targets or {}),
            parameters=writer.operands(parameters or {}),
            no_grad=no_grad,
            max_order=max_order,
            fetch_below=_EVERYTHING if fetch else fetch_below,
        )
        if isinstance(callee, str):
            op.operation = callee
            if options:
                op.options_json = json.dumps(options, allow_nan=False)
        elif isinstance(callee, Loss):
            op.loss.CopyFrom(callee.message())
        else:
            op.function.CopyFrom(callee)
            set_mode(op.function, train, seed)
        if handles is None and not changes:
            handles = [self.new_handle(1 if isinstance(callee, str | Loss) else BLOCK)]
        op.handles.extend(handles or ())
        return self._submit(pb.SessionRequest(call=op), writer, what, changes)

    def grad(
        self,
        outputs: Sequence[int],
        inputs: Sequence[int],
        grad_outputs: Sequence[Operand | None] | None = None,
        *,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        allow_unused: bool = False,
        is_grads_batched: bool = False,
        detect_anomaly: bool = False,
        fetch_below: int = 0,
        fetch: Sequence[int] | bool = False,
    ) -> Pending:
        """torch.autograd.grad. The result has one entry for each of `inputs`.

        fetch: whether the gradients come back in the answer, or the positions in `inputs` of those that do.
        """
        writer = FrameWriter(self._stream, "grad", self.deadline(None))
        first = self.new_handle(len(inputs))
        positions = () if isinstance(fetch, bool) else fetch
        op = pb.GradOp(
            outputs=outputs,
            grad_outputs=[writer.operand("", one) for one in grad_outputs or [None] * len(outputs)],
            inputs=inputs,
            handles=range(first, first + len(inputs)),
            retain_graph=retain_graph,
            create_graph=create_graph,
            allow_unused=allow_unused,
            is_grads_batched=is_grads_batched,
            detect_anomaly=detect_anomaly,
            fetch=[first + position for position in positions],
            fetch_below=_EVERYTHING if fetch is True else fetch_below,
        )
        return self._submit(pb.SessionRequest(grad=op), writer, "grad")

    def get(self, handles: Sequence[int], timeout: float | None = None) -> list[Array]:
        """Reads values. Raises PullbackError."""
        self.must_wait("reading a value", "await tensor.numpy(), .item() or .tolist()")
        writer = FrameWriter(self._stream, "get", 0.0)
        pending = self._submit(pb.SessionRequest(get=pb.GetOp(handles=handles)), writer, "get")
        values = [info.value for info in self.settle(pending, timeout)]
        if len(values) != len(handles) or any(value is None for value in values):
            raise errors.ProtocolError(f"{len(handles)} values were asked for, the server did not send them all")
        return [value for value in values if value is not None]

    def parameters(self, model: str, version: str, names: Sequence[str]) -> list[int]:
        """Handles for hosted parameters, as leaves that require grad.

        They start with the hosted values and belong to the session.
        """
        first = self.new_handle(len(names))
        handles = list(range(first, first + len(names)))
        op = pb.ParametersOp(model=pb.ModelRef(name=model, version=version), names=names, handles=handles)
        writer = FrameWriter(self._stream, "parameters", 0.0)
        pending = self._submit(pb.SessionRequest(parameters=op), writer, f"parameters of {model!r}")
        if not self.pipelined:
            pending.result()
        return handles

    def stateless(self, op: pb.StatelessOp, writer: FrameWriter, what: str) -> Pending:
        """A call of GradientService on the session's worker; its tensors were described by `writer`."""
        return self._submit(pb.SessionRequest(stateless=op), writer, what)

    def writer(self, what: str, timeout: float | None = None) -> FrameWriter:
        """For the tensors of a `stateless` call."""
        return FrameWriter(self._stream, what, self.deadline(timeout))

    def reader(self, reply: Reply) -> FrameReader:
        """Reads the tensors of an answer that `Pending.wait` gave."""
        return FrameReader(reply, self._stream)

    def release(self, handle: int) -> None:
        """Lets a handle go, with whatever is sent next. Takes no lock and sends nothing, so finalizers may call it."""
        self._stream.released.append(handle)

    def _submit(self, frame: pb.SessionRequest, writer: FrameWriter, what: str, changes: bool = False) -> Pending:
        self.make_room(what)
        reply = Reply(what)
        self._stream.send(frame, writer.payloads, reply, changes)
        pending = Pending(self, reply)
        if self.pipelined:
            self._unseen.append(pending)
        return pending

    def settle(self, pending: Pending, timeout: float | None = None) -> list[HandleInfo]:
        """The result of `pending`, once every op sent before it is known to have succeeded.

        Raises the first failure among them that nobody has heard of yet, naming its op.
        """
        try:
            result = pending.result(timeout)
        except errors.PullbackError as error:
            if isinstance(error, errors.DependencyFailed):
                self._raise_earlier(pending)
            raise _naming(error, pending, self.pipelined) from error.__cause__
        self._raise_earlier(pending)
        return result

    def _raise_earlier(self, last: Pending) -> None:
        first: Pending | None = None
        with self._numbers:
            while self._unseen and self._unseen[0].op <= last.op:
                earlier = self._unseen.popleft()
                # What failed because of the first would only say the same again.
                if first is None and earlier.failed_unheard():
                    first = earlier
        if first is not None and first._reply.error is not None:
            raise _naming(copy.copy(first._reply.error), first, True)

    def synchronize(self, timeout: float | None = None) -> None:
        """In a pipelined session, waits until all ops are done. Raises the first failure that nobody has heard of."""
        if self._unseen:
            last = self._unseen[-1]
            self._stream.wait(last._reply.is_done, last._reply.what, self.deadline(timeout))
            self._raise_earlier(last)

    # ---- its tensors and its end

    def tensor(self, data: Any, requires_grad: bool = False, dtype: Any = None) -> Tensor:
        """A tensor of this session; arguments as of `pullback.tensor`. Its data is sent with its first use.

        When the session ends, what is known here of a tensor stays good, and may be used in other sessions.

        Raises TypeError, ValueError, NotDifferentiable; SessionLost where the session has ended.
        """
        from pullback._tensor import tensor

        self._stream.check("tensor")
        return tensor(data, requires_grad, dtype, session=self)

    def close(self) -> None:
        """Ends the session and frees everything that it holds on the server. Closing twice is harmless."""
        self.model_parameters.clear()
        self.retained.clear()
        self.written.clear()
        self._stream.close()

    def __enter__(self) -> Session:
        self._stream.check("")
        enter(self, self._around, threading.get_ident())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        leave(self._around, threading.get_ident())
        try:
            if kind is None and self.pipelined:
                self.synchronize()
        finally:
            if not self._around:
                self.close()


def enter(session: Session, around: dict[Who, list[Session | None]], who: Who) -> None:
    """Makes a session the current one of a thread (or task)."""
    around.setdefault(who, []).append(current.get())
    current.set(session)


def leave(around: dict[Who, list[Session | None]], who: Who) -> None:
    """Undoes the last `enter`.

    By set() and not by a token's reset(), and be it another's: generators, as fixtures and dependencies are, may be
    ended in another context or by another task than the one that began them.
    """
    mine = who if who in around else next(iter(around), None)
    if mine is not None:
        current.set(around[mine].pop())
        if not around[mine]:
            del around[mine]


def _naming(error: errors.PullbackError, pending: Pending, pipelined: bool) -> errors.PullbackError:
    """Says in a pipelined session which op it was, as the line that raises is another one."""
    if pipelined and not isinstance(error, errors.SessionLost | errors.DeadlineExceeded):
        error.message = f"op {pending.op} ({pending._reply.what}): {error.message}"
    return error


def _open(kind: type[Stream], transport: Transport, models: Sequence[tuple[str, str]], deadline: float) -> Stream:
    """Opens a stream, with retries: nothing is lost by another attempt."""
    refs = [pb.ModelRef(name=name, version=version) for name, version in models]
    attempt = 0
    while True:
        attempt += 1
        try:
            stream = kind(transport)
            stream.open(pb.OpenSession(models=refs, chunk_threshold=CHUNK_THRESHOLD), deadline)
            return stream
        except errors.PullbackError as error:
            pause = transport.retry.pause(error, attempt)
            if pause is None or time.monotonic() + pause >= deadline:
                raise
        time.sleep(pause)
