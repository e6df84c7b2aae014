"""A worker process: `python -m pullback_server.engine.worker`. Loads the models, then computes job after job.

One thread. While a job computes nothing is read; before the next one begins, everything that has arrived is, so that
a job that was cancelled or has expired meanwhile is passed over.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch

from pullback_server import logs
from pullback_server.engine import Engine, EngineResult, WritesInputs
from pullback_server.engine.boot import choose_device, device_id, device_memory, limit_memory, load_models, settle, told
from pullback_server.engine.members import BatchAnswer, Batches, overdue
from pullback_server.engine.parentage import on_behalf_of
from pullback_server.engine.records import cleaned, fault_record, record_of, trace_of
from pullback_server.engine.sessions import Sessions, op_references
from pullback_server.engine.shelf import Shelf
from pullback_server.engine.tape import TapeResult
from pullback_server.engine.thrift import thrift
from pullback_server.engine.transfer import (
    Piece,
    Pins,
    Watch,
    byte_counts,
    packed,
    pieces,
    references,
    store,
    tensors_of,
)
from pullback_server.faults import Fault
from pullback_server.hosting.loading import LoadError
from pullback_server.ipc import messages
from pullback_server.ipc.frames import DO_NOT_WAIT, Frame, FrameReader, send_frame
from pullback_server.ipc.layout import INLINE_LIMIT, Buffer, place
from pullback_server.ipc.segments import Arena, Mappings, Segment
from pullback_server.job import Batch, BatchOutcome, FaultRecord, Job
from pullback_server.ops import SessionJob
from pullback_wire import Reason

#: Causes after which a CUDA device may be of no more use.
_SUSPICIOUS = {Reason.INTERNAL.value, Reason.MODEL_ERROR.value, Reason.OUT_OF_MEMORY.value}


class _Staged(NamedTuple):
    """A run that was not begun. passed_over: the members of a batch for whom nobody waits any more."""

    run: messages.Run
    memory: memoryview | bytearray
    passed_over: set[int]


class _Answer(NamedTuple):
    message: messages.Done | messages.Failed | messages.Again
    tail: Sequence[Buffer] = ()
    segment: Segment | None = None


class Worker:
    """Answers what the front sends until the front closes the connection."""

    def __init__(
        self, sock: socket.socket, reader: FrameReader, engine: Engine, shelf: Shelf, setup: messages.Setup
    ) -> None:
        self._socket = sock
        self._reader = reader
        self._engine = engine
        self._shelf = shelf
        self._sessions = Sessions(engine)
        self._device = torch.device(setup.device)
        self._batches = Batches(engine, self._device)
        self._pins = Pins(self._device)
        self._inbound = Mappings(writable=True)
        self._outbound = Arena(setup.idle_bytes, lambda segment: self._pins.remove(segment.mapping()))
        self._staged: deque[_Staged | messages.Load | messages.Unload] = deque()
        self._connected = True
        self._usable = True

    def serve(self) -> None:
        """Raises OSError when the connection breaks."""
        while self._usable and (self._connected or self._staged):
            self._receive()
            if self._staged:
                first = self._staged.popleft()
                if isinstance(first, _Staged):
                    self._answer(first)
                else:
                    self._change(first)

    def _receive(self) -> None:
        """Takes in what arrived during the last job; waits for something to arrive when there is nothing to do."""
        if self._staged and self._connected:
            with contextlib.suppress(BlockingIOError):
                self._connected = self._reader.receive(DO_NOT_WAIT)
                self._take_frames()
        while self._connected and not self._staged:
            self._connected = self._reader.receive()
            self._take_frames()

    def _take_frames(self) -> None:
        while (frame := self._reader.next()) is not None:
            self._take(frame)

    def _take(self, frame: Frame) -> None:
        match messages.decode_to_worker(frame.message):
            case messages.Run() as run:
                if run.note is not None:
                    self._heed(run.note)
                self._staged.append(_Staged(run, self._memory(run.slot, frame), set()))
            case messages.Cancel(id, member):
                self._cancel(id, member)
            case messages.Note() as note:
                self._heed(note)
            case messages.Uploaded(slots):
                for slot in reversed(slots):
                    # The segment may have served jobs before.
                    self._pins.remove(self._inbound.drop(slot.segment))
                    self._pins.add(self._inbound.add(slot.segment, slot.size, frame.fds.pop()))
            case messages.EndSession(session):
                self._end(session)
            case messages.Load() | messages.Unload() as change:
                self._staged.append(change)
            case messages.Setup():
                raise RuntimeError("a worker is set up once")

    def _cancel(self, id: int, member: int) -> None:
        for staged in self._runs():
            if staged.run.id == id:
                if member >= 0 and isinstance(staged.run.job, Batch):
                    staged.passed_over.add(member)
                    if len(staged.passed_over) < len(staged.run.job.members):
                        return
                self._pass_over(staged)
                return

    def _runs(self) -> list[_Staged]:
        return [staged for staged in self._staged if isinstance(staged, _Staged)]

    def _pass_over(self, staged: _Staged) -> None:
        self._staged.remove(staged)
        self._drop_uploads(staged.run)
        self._send(messages.Skipped(staged.run.id))

    def _end(self, session: int) -> None:
        for staged in self._runs():
            if isinstance(staged.run.job, SessionJob) and staged.run.job.session == session:
                self._pass_over(staged)
        self._sessions.end(session)

    def _drop_uploads(self, run: messages.Run) -> None:
        """The front gives them up as well, so their memory lasts as long as tensors on it."""
        for number, _ in run.uploads:
            self._pins.remove(self._inbound.drop(number))

    def _heed(self, note: messages.Note) -> None:
        for number in note.released:
            self._outbound.free_by_id(number)
        for number in note.kept:
            self._outbound.discard_by_id(number)
        for number in note.dropped:
            self._pins.remove(self._inbound.drop(number))

    def _memory(self, slot: messages.Slot | None, frame: Frame) -> memoryview | bytearray:
        if slot is None:
            return frame.tail
        if slot.size:
            self._pins.add(self._inbound.add(slot.segment, slot.size, frame.fds.pop()))
        return self._inbound.view(slot.segment)

    def _answer(self, staged: _Staged) -> None:
        run = staged.run
        late = time.monotonic() >= run.deadline
        if isinstance(run.job, Batch):
            staged.passed_over.update(overdue(run.job))
            late = late or len(staged.passed_over) == len(run.job.members)
        if late:
            self._drop_uploads(run)
            self._send(messages.Skipped(run.id))
            return
        # What a session keeps is copied out, so that there is nothing to watch.
        watch = Watch() if run.slot is not None and not isinstance(run.job, SessionJob) else None
        with on_behalf_of(run):
            answer = self._compute(staged, watch)
        self._drop_uploads(run)
        # By now nothing here looks at the inputs any more; whoever still does is the model.
        if run.slot is not None and watch is not None and watch.alive():
            answer.message.kept = True
            self._pins.remove(self._inbound.drop(run.slot.segment))
        try:
            self._send(answer.message, answer.tail, answer.segment)
        except OSError:
            raise
        # Names come from the model, and may be what no message can carry.
        except Exception as error:
            if answer.segment is not None:
                self._outbound.free(answer.segment)
            record = record_of(Reason.INTERNAL, "the result cannot be sent", error)
            self._send(messages.Failed(run.id, answer.message.kept, record))
        if isinstance(answer.message, messages.Failed):
            if isinstance(run.job, SessionJob) and answer.message.fault.traceback:
                # The exception of a model may hold what the op had come to, in a circle.
                gc.collect()
            self._check_device([answer.message.fault])
        elif isinstance(answer.message, messages.Done) and isinstance(answer.message.outcome, BatchOutcome):
            self._check_device([m for m in answer.message.outcome.members if isinstance(m, FaultRecord)])

    def _change(self, change: messages.Load | messages.Unload) -> None:
        self._send(messages.Changing(change.number))
        pid = os.getpid()
        if isinstance(change, messages.Load):
            answer = self._shelf.load(change.number, change.item, change.verdict)
            if os.getpid() != pid:
                # A factory has forked and returned in both: the connection is the parent's.
                os._exit(0)
            self._send(answer)
        else:
            self._shelf.unload(change.model, change.id)
            self._send(messages.Unloaded(change.number))

    def _compute(self, staged: _Staged, watch: Watch | None) -> _Answer:
        run = staged.run
        try:
            begin = time.perf_counter()
            ready, began = begin, time.monotonic()
            result: EngineResult | TapeResult | BatchAnswer
            if isinstance(run.job, Batch):
                result = self._batches.run(run.job, self._places(staged), watch, staged.passed_over)
            else:
                tensors = self._tensors(staged, run.job, watch)
                ready, began = time.perf_counter(), time.monotonic()
                if isinstance(run.job, SessionJob):
                    result = self._sessions.run(run.job, tensors)
                else:
                    result = self._engine.run(run.job, tensors)
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
            if isinstance(result, TapeResult) and result.signs is not None:
                result.outcome.health = result.signs.read()
            computed = time.perf_counter()
            answer = self._store(run.id, result, computed - ready, began)
            timings = result.outcome.timings
            timings["copy_in"] = timings.get("copy_in", 0.0) + ready - begin
            timings["copy_out"] = timings.get("copy_out", 0.0) + time.perf_counter() - computed
            return answer
        except WritesInputs:
            return _Answer(messages.Again(run.id, False))
        except Fault as fault:
            record = fault_record(fault)
        except (MemoryError, torch.OutOfMemoryError) as error:
            record = record_of(Reason.OUT_OF_MEMORY, "memory ran out", error)
        # Whatever a model manages to raise, SystemExit included, must not cost the other callers their worker.
        except BaseException as error:
            record = record_of(Reason.INTERNAL, "the worker failed", error)
        return _Answer(messages.Failed(run.id, False, record))

    def _places(self, staged: _Staged) -> list[Piece]:
        run = staged.run
        places = pieces(staged.memory, run.lengths)
        return places + [pieces(self._inbound.view(number), [size])[0] for number, size in run.uploads]

    def _tensors(self, staged: _Staged, job: Job | SessionJob, watch: Watch | None) -> list[torch.Tensor]:
        run, places = staged.run, self._places(staged)
        if not isinstance(job, SessionJob):
            return tensors_of(references(job), places, watch, self._device)
        tensors = tensors_of(op_references(job), places, None, self._device)
        if self._device.type == "cuda":
            # What the session keeps must have been read before the front uses the memory again, also if the op fails.
            torch.cuda.current_stream(self._device).synchronize()
        elif run.slot is not None:
            # The slot is used again; an upload's segment is not, and the tail of a message is nobody else's.
            packed_ones = len(run.lengths)
            tensors[:packed_ones] = [tensor.clone() for tensor in tensors[:packed_ones]]
        elif len(run.lengths) > 1:
            # A tensor that is kept would keep the whole tail.
            tensors = [tensor.clone() if 4 * tensor.nbytes < len(staged.memory) else tensor for tensor in tensors]
        return tensors

    def _store(
        self, number: int, result: EngineResult | TapeResult | BatchAnswer, compute: float, began: float
    ) -> _Answer:
        lengths = byte_counts(result.tensors)
        _, size = place(lengths)
        done = messages.Done(number, False, result.outcome, compute, lengths, None, began)
        if size <= INLINE_LIMIT:
            return _Answer(done, packed(result.tensors, lengths))
        try:
            segment = self._outbound.take(size)
        except OSError as error:
            raise MemoryError(f"{size} bytes of results: {error}") from error
        try:
            memory = segment.mapping()
            self._pins.add(memory)
            store(result.tensors, lengths, memory)
        except BaseException:
            self._outbound.free(segment)
            raise
        done.slot = messages.Slot(segment.id, 0 if segment.announced else segment.size)
        return _Answer(done, (), segment)

    def _send(self, message: messages.ToFront, tail: Sequence[Buffer] = (), segment: Segment | None = None) -> None:
        if dropped := self._outbound.dropped():
            self._send(messages.Note(dropped=dropped))
        encoded = messages.encode(message)
        fds: list[int] = []
        if segment is not None and not segment.announced:
            fds = [segment.fd]
            segment.announced = True
        send_frame(self._socket, encoded, tail, fds)

    def _check_device(self, faults: Sequence[FaultRecord]) -> None:
        """Some CUDA errors (a device-side assert) spoil the process's context for good: then only a new one helps."""
        if self._device.type != "cuda" or all(fault.reason not in _SUSPICIOUS for fault in faults):
            return
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError as error:
            self._usable = False
            self._send(messages.Leaving(f"the device is of no more use: {error}"))


def _first_message(reader: FrameReader) -> messages.Setup | None:
    while (frame := reader.next()) is None:
        if not reader.receive():
            return None
    setup = messages.decode_to_worker(frame.message)
    if not isinstance(setup, messages.Setup):
        raise RuntimeError("a worker is set up first")
    return setup


def _work(sock: socket.socket) -> None:
    reader = FrameReader(sock)
    setup = _first_message(reader)
    if setup is None:
        return
    if setup.only_register:
        # It serves nobody, and shall not hold up those that do.
        os.nice(5)
    logs.configure_worker(setup.name, setup.log_level, setup.log_format)
    try:
        engine = Engine(choose_device(setup), setup.gradient_health)
        thrift.share = setup.gradient_health_cost
        signatures, known = load_models(engine, setup)
        shelf = Shelf(engine, known, setup.memory_bytes, setup.gate)
        more, failed = shelf.load_all(
            setup.items, lambda item: send_frame(sock, messages.encode(messages.Loading(item.name, item.id)))
        )
        loaded: messages.ToFront = messages.Loaded(
            signatures + more, device_memory(engine.device), failed, list(known), device_id(engine.device)
        )
    except LoadError as error:
        loaded = messages.LoadFailed(cleaned(str(error)), trace_of(error))
    # A fault of ours: the operator must hear of that as well.
    except Exception as error:
        loaded = messages.LoadFailed(cleaned(f"the worker failed: {told(error)}"), trace_of(error))
    if isinstance(loaded, messages.LoadFailed):
        send_frame(sock, messages.encode(loaded))
        return
    # What is there now stays; looking for garbage after a job need not pass over it.
    gc.collect()
    gc.freeze()
    limit_memory(engine.device, setup.memory_bytes)
    worker = Worker(sock, reader, engine, shelf, setup)
    send_frame(sock, messages.encode(loaded))
    worker.serve()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a worker. Raises SystemExit for arguments that cannot be."""
    parser = argparse.ArgumentParser(prog="pullback_server.engine.worker", description="started by the fleet")
    parser.add_argument("--socket", type=int, required=True, help="descriptor of the control connection")
    parser.add_argument("--parent", type=int, required=True, help="pid of the front")
    arguments = parser.parse_args(argv)
    settle(arguments.parent)
    os.set_inheritable(arguments.socket, False)
    with socket.socket(fileno=arguments.socket) as sock:
        try:
            _work(sock)
        except (BrokenPipeError, ConnectionResetError):
            # The front has gone; there is nobody left to tell.
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
