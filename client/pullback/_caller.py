"""How a call of a `RemoteModel` goes: names, request, answer, and the signature that names need."""

from __future__ import annotations

import contextlib
import copy
import math
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message import Message

from pullback import errors
from pullback._info import ModelInfo, model_info
from pullback._naming import Named
from pullback._request import Common, Draft
from pullback._results import Answer, Answered, VjpResult
from pullback._transport import Transport
from pullback_wire import MODEL_METHODS, TensorReader, WireError
from pullback_wire.framing import Buffer
from pullback_wire.v1 import function_pb2, model_service_pb2
from pullback_wire.v1 import gradient_service_pb2 as pb

M = TypeVar("M", bound=Message)
R = TypeVar("R")


#: Requests of at least so many bytes go through a session. One message is quicker as far as it goes (benchmarks/
#: sessions.py), but takes several times its bytes of the front's memory.
BULK_BYTES = 256 << 20
_DENSE = ("ComputeJacobian", "ComputeHessian")
#: Seconds that may lie between two who ask at once and have as much time.
_AS_PATIENT = 0.05
#: Seconds after which a model that is being loaded is asked for again.
_LOADING_AGAIN = 1.0


def bulky(transport: Transport, payloads: Sequence[Buffer]) -> bool:
    """Whether a request goes through a session."""
    size = sum(map(len, payloads))
    return size >= BULK_BYTES or size > transport.address.max_message_bytes - (64 << 10)


class _Inquiry:
    """One question for a signature that is under way, for all who want it meanwhile.

    deadline: until which who asks would wait. found, error: once `over` is set; neither: it was given up.
    """

    def __init__(self, transport: Transport, deadline: float) -> None:
        self.where = transport.where()
        self.deadline = deadline
        self.over = transport.event()
        self.found: ModelInfo | None = None
        self.error: errors.PullbackError | None = None


class Caller:
    """Makes the calls of one model. version: empty: the latest that is ready."""

    def __init__(self, transport: Transport, name: str, version: str) -> None:
        self.transport = transport
        self.name = name
        self.version = version
        self._info: ModelInfo | None = None
        self._inquiry: _Inquiry | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_inquiry": None}

    @property
    def target(self) -> str:
        """Where calls go."""
        return self.transport.address.target

    async def info(self, timeout: float | None = None) -> ModelInfo:
        """What the server says of the model, in whatever state; asked for once it is ready, for all who ask at once."""
        info = self._info
        if info is not None:
            return info
        deadline = self.transport.deadline(timeout)
        while (inquiry := self._inquiry) is not None and inquiry.where == self.transport.where():
            if not await self.transport.until(inquiry.over, deadline):
                raise errors.DeadlineExceeded(f"{self._what('info')}: no answer from {self.target} in time")
            if inquiry.found is not None:
                return inquiry.found
            # Who would wait for longer may fare better, and whoever asked may have been cancelled.
            if inquiry.error is not None and deadline <= inquiry.deadline + _AS_PATIENT:
                raise copy.copy(inquiry.error) from inquiry.error.__cause__
            timeout = max(deadline - time.monotonic(), 1e-3)
        return await self._inquire(timeout, deadline)

    async def _inquire(self, timeout: float | None, deadline: float) -> ModelInfo:
        mine = self._inquiry = _Inquiry(self.transport, deadline)
        try:
            request = model_service_pb2.GetModelRequest(name=self.name, version=self.version)
            response, _ = await self.transport.call(
                MODEL_METHODS["GetModel"], request, (), model_service_pb2.GetModelResponse, self._what("info"), timeout
            )
            mine.found = model_info(response.model)
            # Not after a `forget`: it may be an answer of before.
            if mine.found.state == "ready" and self._inquiry is mine:
                self._info = mine.found
            return mine.found
        except errors.PullbackError as error:
            # Without its traceback, which leads here.
            mine.error = copy.copy(error)
            mine.error.__cause__ = error.__cause__
            raise
        finally:
            if self._inquiry is mine:
                self._inquiry = None
            # The event loop may be closed by now.
            with contextlib.suppress(RuntimeError):
                mine.over.set()

    async def graph(
        self, train: bool, max_nodes: int | None, timeout: float | None
    ) -> model_service_pb2.GetModelGraphResponse:
        """Asks for the model's autograd graph. Raises ValueError, PullbackError."""
        nodes = 0 if max_nodes is None else operator.index(max_nodes)
        if max_nodes is not None and not 0 < nodes < 2**31:
            raise ValueError(f"max_nodes is {max_nodes}, expected a positive number")
        request = model_service_pb2.GetModelGraphRequest(
            name=self.name,
            version=self.version,
            mode=function_pb2.MODE_TRAIN if train else function_pb2.MODE_EVAL,
            max_nodes=nodes,
        )
        method, response = MODEL_METHODS["GetModelGraph"], model_service_pb2.GetModelGraphResponse
        found, _ = await self.transport.call(method, request, (), response, self._what("graph"), timeout)
        return found

    def signature(self, timeout: float | None = None) -> ModelInfo:
        """As `learn`. Blocks."""
        return self.transport.run(self.learn(timeout))

    async def learn(self, timeout: float | None = None) -> ModelInfo:
        """As `info`, of a model that can be called. One that is being loaded is waited for, as calls do.

        timeout: of the call that needs it.

        Raises what the server would answer to a call: NotReady, ModelNotFound, VersionNotFound.
        """
        deadline = self.transport.deadline(timeout)
        attempt = 0
        while (info := await self.info(timeout)).state != "ready":
            attempt += 1
            error = self._not_callable(info)
            pause = self.transport.retry.pause(error, attempt)
            if pause is None or time.monotonic() + pause >= deadline:
                raise error
            await self.transport.sleep(pause)
        return info

    def _not_callable(self, info: ModelInfo) -> errors.PullbackError:
        said = f"is {info.state}" + (f": {info.state_reason}" if info.state_reason else "")
        message = f"model {self.name!r} version {info.version} cannot be called, it {said}"
        if info.state == "loading":
            return errors.NotReady(message, retry_after=_LOADING_AGAIN)
        return errors.VersionNotFound(message) if self.version else errors.ModelNotFound(message)

    def forget(self) -> None:
        """The model may have another signature by now; the next call asks."""
        self._info = self._inquiry = None

    @contextmanager
    def draft(self, name: str, common: Common) -> Iterator[Draft]:
        """A request of the RPC `name`, to be filled in and asked while the context lasts."""
        try:
            yield Draft(name, self.name, self.version, common, lambda: self.learn(common.timeout))
        except errors.BadName:
            self.forget()
            raise

    async def vjp(
        self,
        draft: Draft,
        wrt: str | Sequence[str] | None,
        structure: Callable[[Named], Any],
        *,
        allow_unused: bool,
        batched: bool,
        max_norm: float | None,
        return_outputs: bool,
        timeout: float | None,
    ) -> VjpResult:
        """ComputeVjp. structure: makes what is returned as the gradients of the gradients by name."""
        message = draft.message
        draft.wrt(wrt, allow_unused)
        message.cotangents_batched = batched
        if max_norm is not None:
            if not 0 < max_norm < math.inf:
                raise ValueError(f"max_norm is {max_norm}, expected a positive number")
            message.max_norm = max_norm
        if not return_outputs:
            draft.omit_outputs()

        def read(answered: pb.ComputeVjpResponse, answer: Answer) -> VjpResult:
            outputs = answer.outputs(answered.outputs, return_outputs)
            norms = np.array(answered.norms, dtype=np.float64)
            if max_norm is not None and not batched and len(norms) != 1:
                raise WireError(f"one norm was asked for, {len(norms)} came", "norms")
            norm = None if max_norm is None else norms if batched else float(norms[0])
            return VjpResult(outputs, structure(answer.named(answered.gradients, "gradients")), norm)

        return await self.ask(draft, pb.ComputeVjpResponse, timeout, read)

    async def ask(self, draft: Draft, response: type[M], timeout: float | None, read: Callable[[M, Answer], R]) -> R:
        """Sends a draft and reads the answer."""
        what = self._what(draft.method.name.removeprefix("Compute").lower())
        message, reader = await self._asked(draft, response, what, timeout)

        def finish() -> R:
            answer = Answer(reader)
            result = read(message, answer)
            answer.finish()
            return result

        try:
            result = await self.transport.copying(reader.payloads, finish)
        except WireError as error:
            raise errors.ProtocolError(
                f"{what}: {self.target} sent an answer that contradicts itself: {error}"
            ) from error
        answered: Any = message
        await self._check_version(draft, answered.model_version, answered.model_revision)
        if isinstance(result, Answered):
            result.model_version, result.model_revision = answered.model_version, answered.model_revision
        return result

    async def _check_version(self, draft: Draft, version: str, revision: int) -> None:
        """Forgets the signature of another version than the one that answered.

        Raises BadName where names were taken from it that have other places by now: the call was another one.
        """
        known = draft.named_by or self._info
        if not version or known is None or (known.version, known.revision) == (version, revision):
            return
        self.forget()
        if draft.named_by is not None and _places(await self.learn()) != _places(draft.named_by):
            raise errors.BadName(
                f"model {self.name!r} was replaced by version {version}, whose inputs or outputs have other names or "
                "places; the call was made with those of before: make it again, or pass tensors by name"
            )

    async def _asked(self, draft: Draft, response: type[M], what: str, timeout: float | None) -> tuple[M, TensorReader]:
        """By one message, or by a session where the tensors are large, be it only those of the answer."""
        refused: errors.PullbackError | None = None
        if not bulky(self.transport, draft.payloads):
            try:
                return await self._by_message(draft, response, what, timeout)
            except errors.MessageTooLarge as error:
                refused = error
            except errors.ResultTooLarge as error:
                if draft.method.name in _DENSE:
                    # What is refused there are sizes that nobody meant.
                    raise
                refused = error
        try:
            from pullback._bulk import pool_of

            pool = pool_of(self.transport)
            return await self.transport.aside(
                pool.call, draft.method, draft.message, draft.payloads, response, what, timeout
            )
        except errors.Unimplemented:
            # A server without sessions.
            if refused is not None:
                raise refused from refused.__cause__
            return await self._by_message(draft, response, what, timeout)

    async def _by_message(
        self, draft: Draft, response: type[M], what: str, timeout: float | None
    ) -> tuple[M, TensorReader]:
        message, payloads = await self.transport.call(
            draft.method, draft.message, draft.payloads, response, what, timeout
        )
        return message, TensorReader(payloads)

    def _what(self, method: str) -> str:
        return f"model {self.name!r}: {method}"


def _places(info: ModelInfo) -> tuple[list[str], list[str]]:
    """Names by position."""
    return [one.name for one in info.inputs], [one.name for one in info.outputs]
