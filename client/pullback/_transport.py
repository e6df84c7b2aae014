"""One call from message to message: framing, deadline, retries, errors."""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, ParamSpec, TypeVar

from google.protobuf.message import Message

from pullback import errors
from pullback._blocking import run
from pullback._calls import Metadata, accompany, read_timings, recorded
from pullback._channel import Address, ForkAwareChannel
from pullback._fork import gate
from pullback._retry import RetryPolicy
from pullback._translate import from_rpc_error, never_connected
from pullback_wire import Method, WireError, decode, encode
from pullback_wire.framing import Buffer

M = TypeVar("M", bound=Message)
P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T", bound="Transport")
Trailers = Iterable[tuple[str, str | bytes]] | None

#: gRPC takes a timeout as the distance to a point in time and overflows far below a float's range.
LONGEST = 3e8
#: Room for the tags and lengths of one payload.
_FRAMING = 12


def check_timeout(timeout: float | None) -> None:
    """Raises ValueError for a timeout that is not a positive number (infinity is) or None."""
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout is {timeout}, expected a positive number of seconds, math.inf, or None")


class Transport:
    """Makes calls to one address. Safe to use from many threads, in forked children, and to pickle.

    timeout: seconds for a call and all its attempts, where the call says nothing; None or infinity: no limit.
    Its coroutines wait by what is under "how it waits" alone. Here that blocks, so they end at their first step (see
    `_blocking`); another class may wait otherwise.

    everyone: all transports of this process that are in use, and whose clients have a session of their own.
    belongings: what others keep for as long as it lives, by what it is; not pickled.
    """

    everyone: ClassVar[weakref.WeakSet[Transport]] = weakref.WeakSet()
    #: Whether tensors for which no session was opened get one.
    has_own_session: ClassVar[bool] = True
    #: Entered for each attempt.
    gate: ClassVar[AbstractContextManager[None]] = gate

    def __init__(self, address: Address, timeout: float | None, retry: RetryPolicy) -> None:
        check_timeout(timeout)
        self.address = address
        self.timeout = timeout
        self.retry = retry
        self._channel = ForkAwareChannel(address)
        self.belongings: dict[str, Any] = {}
        self.everyone.add(self)

    def __getstate__(self) -> tuple[Address, float | None, RetryPolicy]:
        return (self.address, self.timeout, self.retry)

    def __setstate__(self, state: tuple[Address, float | None, RetryPolicy]) -> None:
        self.address, self.timeout, self.retry = state
        self._channel = ForkAwareChannel(self.address)
        self.belongings = {}
        self.everyone.add(self)

    def line(self) -> Transport:
        """The same connection without what belongs to it, for that to hold: so nothing here goes round in circles.

        A client that is dropped then takes its sessions along at once.
        """
        return self._share(type(self))

    def _share(self, kind: type[T]) -> T:
        line = object.__new__(kind)
        line.address, line.timeout, line.retry = self.address, self.timeout, self.retry
        line._channel = self._channel
        line.belongings = {}
        return line

    # ---- how it waits

    def run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        """What a coroutine over this transport returns. Blocks."""
        return run(coroutine)

    def where(self) -> object:
        """Those who are at one place may wait for each other: the threads of one process, the tasks of one loop."""
        return gate.generation

    def event(self) -> Any:
        """Something for `until`; has set() and is_set()."""
        return threading.Event()

    async def until(self, event: Any, deadline: float) -> bool:
        """Waits for an event of the same place. Returns whether it came in time."""
        return bool(event.wait(min(max(deadline - time.monotonic(), 0.0), LONGEST)))

    async def unary(
        self, path: str, data: bytes, timeout: float | None, metadata: Metadata, told: bool
    ) -> tuple[bytes, Trailers]:
        """One attempt of a unary call: its answer, and if `told` its trailing metadata. Raises grpc.RpcError."""
        # Blocking, and not through a future: that takes a thread switch more. An exception that arrives meanwhile,
        # such as KeyboardInterrupt, cancels the call.
        if told:
            answer, call = self._channel.unary(path).with_call(data, timeout=timeout, metadata=metadata)
            return answer, call.trailing_metadata()
        return self._channel.unary(path)(data, timeout=timeout, metadata=metadata), None

    async def authorization(self) -> Metadata:
        """See `Address.authorization`."""
        return self.address.authorization()

    async def sleep(self, seconds: float) -> None:
        """Lets time pass."""
        time.sleep(seconds)  # noqa: ASYNC251

    async def aside(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """What a function returns that blocks, or computes for long."""
        return function(*args, **kwargs)

    async def copying(self, buffers: Sequence[Buffer], function: Callable[[], R]) -> R:
        """What a function returns that copies these."""
        return function()

    # ---- calls

    async def call(
        self,
        method: Method,
        request: Message,
        payloads: Sequence[Buffer],
        response: type[M],
        what: str,
        timeout: float | None,
        *,
        pure: bool = True,
    ) -> tuple[M, Sequence[memoryview]]:
        """The parsed answer, and views of its payloads.

        what: names the call in errors, e.g. "model 'square': vjp"; timeout: None: the default; pure: see `send`.

        Raises PullbackError.
        """
        header = request.SerializeToString()
        size = len(header) + sum(len(payload) + _FRAMING for payload in payloads)
        if size > self.address.max_message_bytes:
            raise errors.MessageTooLarge(
                f"{what}: the request has {size:,} bytes, this client's limit (max_message_bytes of pullback.connect) "
                f"is {self.address.max_message_bytes:,}"
            )
        answer = await self.send(method.path, encode(header, payloads), what, timeout, pure=pure)
        return self.read(response, answer, what)

    def read(self, response: type[M], answer: bytes, what: str) -> tuple[M, Sequence[memoryview]]:
        """An answer, parsed, and views of its payloads. Raises ProtocolError."""
        try:
            return decode(response, answer)
        except WireError as error:
            raise errors.ProtocolError(
                f"{what}: {self.address.target} answered what cannot be read: {error}"
            ) from error

    async def send(
        self, path: str, data: bytes, what: str, timeout: float | None, attempts: int | None = None, pure: bool = True
    ) -> bytes:
        """The bytes of the answer to `data`.

        attempts: how many there are at most, where it is not the policy's to say.
        pure: False: it changes something, so it is made again only after attempts that did not reach a server, or that
            one refused for their token, where there is another by now.

        Raises PullbackError: the last attempt's, when none succeeded.
        """
        timings = recorded()
        id, common = accompany(self.address.metadata, timings is not None)

        async def make(left: float | None, authorization: Metadata) -> bytes:
            began = time.perf_counter()
            answer, trailers = await self.unary(path, data, left, (*common, *authorization), timings is not None)
            if timings is not None:
                took = time.perf_counter() - began
                if (told := read_timings(trailers, what, id, took)) is not None:
                    timings.append(told)
            return answer

        return await self._persist(make, what, timeout, attempts, pure, id)

    def upload(self, path: str, send: Callable[[Any], bytes], what: str, timeout: float | None) -> bytes:
        """The bytes of the answer to a stream, which is not pure. Blocks.

        send: makes one attempt, given a function that begins the call with an iterator of bytes and returns gRPC's
            call object; returns the answer.

        Raises PullbackError.
        """

        id, common = accompany(self.address.metadata)

        async def make(left: float | None, authorization: Metadata) -> bytes:
            metadata = (*common, *authorization)
            method = self._channel.channel().stream_unary(path, request_serializer=None, response_deserializer=None)
            return send(lambda parts: method.future(parts, timeout=left, metadata=metadata))

        return self.run(self._persist(make, what, timeout, None, False, id))

    async def _persist(
        self,
        make: Callable[[float | None, Metadata], Awaitable[bytes]],
        what: str,
        timeout: float | None,
        attempts: int | None,
        pure: bool,
        id: str,
    ) -> bytes:
        """What `make`, given the seconds that are left, returns at last. id: of the call, the same for all attempts."""
        check_timeout(timeout)
        limit = self.timeout if timeout is None else timeout
        if limit is not None and limit > LONGEST:
            limit = None
        end = math.inf if limit is None else time.monotonic() + limit
        attempt = 0
        authorization = await self.authorization()
        renewed = False
        while True:
            attempt += 1
            try:
                return await self._attempt(make, authorization, what, limit, end, id)
            except errors.Unauthenticated:
                # Refused before anything was done. A token may have expired since it was asked for.
                if renewed or attempt == attempts:
                    raise
                renewed = True
                if (fresh := await self.authorization()) == authorization:
                    raise
                authorization = fresh
                continue
            except errors.PullbackError as error:
                again = attempt != attempts and (pure or never_connected(error))
                pause = self.retry.pause(error, attempt) if again else None
                if pause is None or time.monotonic() + pause >= end:
                    raise
            await self.sleep(pause)
            if self._channel.closed:
                raise self._is_closed(what)
            authorization = await self.authorization()

    async def _attempt(
        self,
        make: Callable[[float | None, Metadata], Awaitable[bytes]],
        authorization: Metadata,
        what: str,
        limit: float | None,
        end: float,
        id: str,
    ) -> bytes:
        if self._channel.closed:
            raise self._is_closed(what)
        # The gate is around the imports too: one that is under way would hang a child forked meanwhile.
        with self.gate:
            import grpc

            left = None if limit is None else max(end - time.monotonic(), 0.0)
            try:
                return await make(left, authorization)
            except grpc.RpcError as error:
                if self._channel.closed:
                    raise self._is_closed(what) from error
                raise from_rpc_error(error, what, self.address.target, limit, id) from error
            except ValueError:
                # gRPC's word for a channel that was closed between the question above and the call.
                if self._channel.closed:
                    raise self._is_closed(what) from None
                raise

    def stream(self, path: str, requests: Iterator[bytes], authorization: Metadata) -> tuple[Any, str]:
        """gRPC's call object of a bidirectional stream from bytes to bytes, and its id. To be called inside the gate.

        authorization: see Address, which is to be asked outside of it. Raises ClientClosed.
        """
        if self._channel.closed:
            raise self._is_closed("session")
        try:
            method = self._channel.channel().stream_stream(path, request_serializer=None, response_deserializer=None)
            id, metadata = accompany(self.address.metadata)
            return method(requests, metadata=(*metadata, *authorization)), id
        except ValueError:
            # gRPC's word for a channel that was closed just now.
            if self._channel.closed:
                raise self._is_closed("session") from None
            raise

    def deadline(self, timeout: float | None) -> float:
        """When an op that begins now and was given `timeout` has run out of time, on the time.monotonic clock."""
        check_timeout(timeout)
        limit = self.timeout if timeout is None else timeout
        return math.inf if limit is None else time.monotonic() + limit

    def _is_closed(self, what: str) -> errors.ClientClosed:
        return errors.ClientClosed(f"{what}: the client of {self.address.target} is closed")

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._channel.closed

    def close(self) -> None:
        """Closes the connection; calls that run end with ClientClosed."""
        self._channel.close()
