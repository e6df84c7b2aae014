"""Large tensors of a session, in chunks: those that come in, and those that go out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from pullback_server.faults import Fault
from pullback_server.fleet.seam import Buffer, Seat, Upload, WorkerLost
from pullback_wire import Reason, encode
from pullback_wire.v1 import session_service_pb2 as pb
from pullback_wire.v1 import tensor_pb2

#: Bytes of a chunk that the server sends, and of the largest it takes. Smaller ones cost more calls, larger ones gain
#: nothing (benchmarks/sessions.py).
CHUNK = 1 << 20
LARGEST_CHUNK = 4 << 20
#: Bytes of chunks a client may send before it is granted more.
WINDOW = 16 << 20
#: Transfers that a session may have begun and not used.
MAX_TRANSFERS = 1024


class Admission(Protocol):
    """Counts bytes that come in; see Scheduler."""

    def admit_upload(self, size: int) -> None: ...
    def forget_upload(self, size: int) -> None: ...


class ProtocolBreach(Exception):
    """The peer does what the contract rules out; the session cannot go on. The message says what."""


class Inbox:
    """Uploads of one session. Never waits: what there is no room for is refused, and fails the op that refers to it."""

    def __init__(self, seat: Seat, admission: Admission, budget: int) -> None:
        self._seat = seat
        self._admission = admission
        self._budget = budget
        self._uploads: dict[int, Upload] = {}
        self._refused: dict[int, Fault] = {}
        self._latest = 0
        self._bytes = 0

    def take(self, chunk: pb.Chunk, payloads: Sequence[memoryview]) -> int:
        """One chunk. Returns its bytes, which are to be granted again. Raises ProtocolBreach."""
        if chunk.size == 0 and not payloads:
            self._forget(chunk.transfer)
            return 0
        if len(payloads) != 1 or not 0 < len(payloads[0]) <= LARGEST_CHUNK:
            raise ProtocolBreach(f"a chunk has one payload of 1 to {LARGEST_CHUNK} bytes")
        data = payloads[0]
        if chunk.offset == 0:
            self._begin(chunk)
        upload = self._uploads.get(chunk.transfer)
        if upload is None:
            if chunk.transfer not in self._refused:
                raise ProtocolBreach(f"chunk at {chunk.offset} of transfer {chunk.transfer}, which never began")
            return len(data)
        if chunk.offset != upload.received or chunk.size != upload.size or upload.received + len(data) > upload.size:
            raise ProtocolBreach(
                f"chunk at {chunk.offset} of transfer {chunk.transfer} with {len(data)} bytes, of which "
                f"{upload.received} of {upload.size} have come"
            )
        try:
            upload.write(data)
        except OSError as error:
            self._refuse(chunk.transfer, Fault(Reason.OUT_OF_MEMORY, f"there is no memory for a tensor: {error}"))
        return len(data)

    def claim(self, tensor: tensor_pb2.Tensor) -> Upload:
        """The upload that a tensor refers to; it is the caller's from now on. Raises Fault."""
        number = tensor.transfer
        refused = self._refused.pop(number, None)
        if refused is not None:
            raise refused
        upload = self._uploads.get(number)
        if upload is None:
            raise Fault(Reason.BAD_TENSOR, f"tensor {tensor.name!r} refers to transfer {number}, which never came")
        if not upload.complete:
            raise Fault(
                Reason.BAD_TENSOR,
                f"tensor {tensor.name!r} refers to transfer {number}, of which {upload.received} of {upload.size} "
                "bytes have come",
            )
        del self._uploads[number]
        self._uncount(upload)
        return upload

    def close(self) -> None:
        """Gives up everything half-sent."""
        for number in list(self._uploads):
            self._forget(number)

    def _begin(self, chunk: pb.Chunk) -> None:
        if chunk.transfer <= self._latest:
            raise ProtocolBreach(f"transfer {chunk.transfer} begins after transfer {self._latest}; they count up")
        self._latest = chunk.transfer
        if len(self._uploads) + len(self._refused) >= MAX_TRANSFERS:
            raise ProtocolBreach(f"more than {MAX_TRANSFERS} transfers were begun and not used")
        size = chunk.size
        if self._bytes + size > self._budget:
            self._refused[chunk.transfer] = Fault(
                Reason.SESSION_BUDGET,
                f"a tensor of {size} bytes comes while {self._bytes} are on their way; the session may hold "
                f"{self._budget}",
            )
            return
        try:
            self._admission.admit_upload(size)
        except Fault as fault:
            self._refused[chunk.transfer] = fault
            return
        try:
            self._uploads[chunk.transfer] = self._seat.upload(size)
        except (Fault, WorkerLost) as error:
            self._admission.forget_upload(size)
            lost = Fault(Reason.SESSION_LOST, str(error))
            self._refused[chunk.transfer] = error if isinstance(error, Fault) else lost
            return
        self._bytes += size

    def _refuse(self, number: int, fault: Fault) -> None:
        self._forget(number)
        self._refused[number] = fault

    def _forget(self, number: int) -> None:
        self._refused.pop(number, None)
        upload = self._uploads.pop(number, None)
        if upload is not None:
            self._uncount(upload)
            upload.drop()

    def _uncount(self, upload: Upload) -> None:
        self._bytes -= upload.size
        self._admission.forget_upload(upload.size)


class Outbox:
    """Chunks to the client, within the credit that it grants.

    threshold: payloads of this many bytes or more go as chunks. credit: 0: the client takes none.
    """

    def __init__(self, write: Callable[[bytes], Awaitable[None]], threshold: int, credit: int) -> None:
        self._write = write
        self._threshold = threshold
        self._credit = credit
        self.chunks = credit > 0
        #: Since when a chunk has been waiting for credit.
        self.waiting = float("inf")
        self._more = asyncio.Event()
        self._count = 0

    def grant(self, size: int) -> None:
        """The client takes more."""
        self._credit += size
        self._more.set()

    async def send(self, payloads: Sequence[Buffer], room: int) -> tuple[dict[int, int], list[int]]:
        """Sends the large ones of some payloads.

        room: bytes that may stay for the message itself. Returns transfer numbers by payload index, and the indices of
        those that stay.
        """
        transfers: dict[int, int] = {}
        staying: list[int] = []
        for index, payload in enumerate(payloads):
            size = len(payload)
            if self.chunks and size and (size >= self._threshold or size > room):
                self._count += 1
                transfers[index] = self._count
                await self._chunks(self._count, memoryview(payload))
            else:
                room -= size
                staying.append(index)
        return transfers, staying

    async def _chunks(self, transfer: int, payload: memoryview) -> None:
        size = len(payload)
        for offset in range(0, size, CHUNK):
            data = payload[offset : offset + CHUNK]
            if self._credit < len(data):
                self.waiting = time.monotonic()
                while self._credit < len(data):
                    self._more.clear()
                    await self._more.wait()
                self.waiting = float("inf")
            self._credit -= len(data)
            frame = pb.SessionResponse(chunk=pb.Chunk(transfer=transfer, offset=offset, size=size))
            await self._write(encode(frame.SerializeToString(), [data]))
