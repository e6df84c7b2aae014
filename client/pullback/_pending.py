"""`Pending`: an op that was sent, and its answer once it is there."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from pullback import errors
from pullback._frames import HandleInfo, read_handles
from pullback._stream import Reply
from pullback_wire import WireError

if TYPE_CHECKING:
    from pullback._session import Session


class Pending:
    """An op that was sent. Its failure is raised by `result`, as often as that is asked."""

    def __init__(self, session: Session, reply: Reply) -> None:
        self._session = session
        self._reply = reply
        self._read: list[HandleInfo] | None = None
        self._heard_of = False

    @property
    def op(self) -> int:
        """Its number in the session."""
        return self._reply.op

    @property
    def epoch(self) -> int:
        """`Session.epoch` when it was sent."""
        return self._reply.epoch

    def done(self) -> bool:
        """Whether its answer is there already."""
        return self._reply.done

    def succeeded(self) -> bool:
        """Whether its answer is there already, and no failure."""
        return self._reply.done and self._reply.error is None

    def result(self, timeout: float | None = None) -> list[HandleInfo]:
        """Waits for the answer: the tensors that the op made or read, in order.

        timeout: seconds; None: the session's. When it runs out the session is lost, as its state is unknown.

        Raises PullbackError: the op's own, or what ended the session.
        """
        if self._read is None:
            reply = self.wait(timeout)
            try:
                found = read_handles(self._session.reader(reply), reply.message.result.handles)
            except WireError as error:
                # Another thread may have read it meanwhile, after which its bytes are let go.
                if self._read is None:
                    raise errors.ProtocolError(
                        f"{reply.what}: {self._session.transport.address.target} sent an answer that contradicts "
                        f"itself: {error}"
                    ) from error
            else:
                self._read = found
                reply.payloads = ()
                reply.buffers.clear()
        return self._read

    def wait(self, timeout: float | None = None) -> Reply:
        """Waits for the answer as it came. Raises PullbackError as `result` does."""
        reply = self._reply
        if not reply.done:
            self._session._stream.wait(reply.is_done, reply.what, self._session.deadline(timeout))
        if reply.error is not None:
            self._heard_of = True
            raise copy.copy(reply.error)
        return reply

    def failed_unheard(self) -> bool:
        """Whether it is known to have failed, and nobody was told."""
        return self._reply.error is not None and not self._heard_of
