"""Shared memory: what is in use is never given to another, what is idle is bounded, and views outlive everything."""

from __future__ import annotations

import mmap
import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullback_server.ipc.layout import ALIGNMENT, SMALLEST, place, size_class, spaced
from pullback_server.ipc.segments import Arena, Mappings, Segment

MIB = 1 << 20


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def resident(segment: Segment) -> int:
    return os.fstat(segment.fd).st_blocks * 512


@given(st.integers(0, 1 << 40))
def test_size_classes_fit_closely(size: int) -> None:
    fitting = size_class(size)
    assert fitting >= size
    assert fitting == SMALLEST or fitting * 4 <= max(size, 1) * 5
    assert size_class(fitting) == fitting
    assert fitting % mmap.PAGESIZE == 0


@given(st.lists(st.integers(0, 300), max_size=20))
def test_what_is_sent_spaced_lies_where_place_says(lengths: list[int]) -> None:
    payloads = [bytes([index % 256]) * length for index, length in enumerate(lengths)]
    offsets, size = place(lengths)
    joined = b"".join(spaced(payloads))
    assert len(joined) == size
    for payload, offset in zip(payloads, offsets, strict=True):
        assert offset % ALIGNMENT == 0
        assert joined[offset : offset + len(payload)] == payload


def test_a_freed_segment_is_used_again_and_one_in_use_is_not() -> None:
    arena = Arena(64 * MIB)
    first = arena.take(MIB)
    second = arena.take(MIB)
    assert second is not first
    arena.free(first)
    assert arena.take(MIB - 5) is first
    with pytest.raises(ValueError, match="not in use"):
        arena.free(Segment(99, MIB))
    arena.free(first)
    with pytest.raises(ValueError, match="not in use"):
        arena.free(first)


def test_an_identical_load_peaks_no_higher() -> None:
    arena = Arena(16 * MIB)
    peaks = []
    for _ in range(3):
        choice = random.Random(7)
        held: list[Segment] = []
        peak = 0
        in_use = 0
        for _ in range(300):
            if held and choice.random() < 0.5:
                segment = held.pop(choice.randrange(len(held)))
                in_use -= segment.size
                arena.free(segment)
            elif len(held) < 8:
                held.append(arena.take(choice.randrange(1, 9 * MIB)))
                in_use += held[-1].size
            peak = max(peak, arena.bytes)
            assert arena.bytes <= max(16 * MIB, in_use)
        for segment in held:
            arena.free(segment)
        assert arena.bytes <= 16 * MIB
        peaks.append(peak)
    assert max(peaks[1:]) <= max(peaks[0], 16 * MIB)
    arena.close()


def test_what_is_given_up_is_empty_at_once_and_the_reader_is_told() -> None:
    arena = Arena(3 * MIB)
    known, unknown = arena.take(MIB), arena.take(MIB)
    known.announced = True
    os.pwrite(known.fd, b"x" * MIB, 0)
    reader = Mappings(writable=False)
    view = reader.add(known.id, known.size, os.dup(known.fd))
    assert resident(known) == MIB
    copy = os.dup(known.fd)
    arena.free(unknown)
    arena.free(known)
    arena.take(3 * MIB)
    assert arena.dropped() == [known.id]
    assert arena.dropped() == []
    assert os.fstat(copy).st_blocks == 0
    # Still mapped over there: it reads as zeros, and nobody dies of it.
    assert view[0] == 0
    os.close(copy)


def test_a_discarded_segment_keeps_its_bytes_and_is_never_used_again() -> None:
    arena = Arena(64 * MIB)
    reader = Mappings(writable=True)
    segment = arena.take(MIB)
    os.pwrite(segment.fd, b"kept", 0)
    view = reader.add(segment.id, segment.size, os.dup(segment.fd))[:4]
    reader.drop(segment.id)
    arena.discard(segment)
    for _ in range(3):
        other = arena.take(MIB)
        assert other.id != segment.id
        os.pwrite(other.fd, b"other", 0)
    assert bytes(view) == b"kept"
    assert arena.dropped() == []


def test_closing_gives_everything_back_when_it_is_free() -> None:
    before = open_files()
    arena = Arena(64 * MIB)
    idle, used = arena.take(MIB), arena.take(MIB)
    arena.free(idle)
    arena.close()
    assert open_files() == before + 1
    # A thread may be writing into what is in use: its descriptor must not be another file's by then.
    os.pwrite(used.fd, b"late", 0)
    arena.free(used)
    assert open_files() == before
    assert arena.bytes == 0


def test_a_segment_cannot_be_resized_under_its_readers() -> None:
    segment = Segment(1, MIB)
    with pytest.raises(PermissionError):
        os.ftruncate(segment.fd, 0)
    with pytest.raises(PermissionError):
        os.ftruncate(segment.fd, 2 * MIB)
    segment.close()


def test_the_front_cannot_write_what_a_worker_owns() -> None:
    segment = Segment(1, MIB)
    view = Mappings(writable=False).add(1, MIB, os.dup(segment.fd))
    with pytest.raises(TypeError):
        view[0] = 1
    segment.mapping()[0] = 7
    assert view[0] == 7
    segment.close()
    assert view[0] == 7
