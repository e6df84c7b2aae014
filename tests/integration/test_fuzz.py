"""Hostile bytes, for a bounded time: against what reads them, in this process, and against a server, over its sockets.

What `make soak` does for longer. An input that once broke something has a test of its own here.
"""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf import struct_pb2
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.conftest import ZOO
from tests.fuzz import garbage
from tests.fuzz.bombarding import Bombardment
from tests.fuzz.house import Findings, House
from tests.fuzz.recording import Recording, record
from tests.fuzz.targets import TARGETS, seeds
from tests.serving import Served

from pullback_server.faults import Fault
from pullback_wire import GRADIENT_METHODS, WireError, decode, encode
from pullback_wire.framing import MAX_DESCRIPTION, MAX_FIELDS, split
from pullback_wire.v1 import gradient_service_pb2 as pb
from pullback_wire.v1 import session_service_pb2 as session

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
#: Seconds of coverage-guided fuzzing, each target.
SECONDS = 2


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    options = ("--devices", "cpu", "--session-bytes", str(64 * MIB), "--max-message-bytes", str(16 * MIB))
    served = Served(tmp_path_factory.mktemp("served"), str(ZOO), *options)
    yield served
    served.process.terminate()
    served.process.wait(60)


@pytest.fixture(scope="module")
def recording(served: Served) -> Recording:
    return record(served.target)


@pytest.fixture(scope="module")
def house(served: Served) -> House:
    return House(served.process.pid, served.target, served.http, served.log)


# Over the sockets.


def test_hostile_calls_are_told_why_and_harm_nobody(served: Served, recording: Recording, house: House) -> None:
    findings = Findings()

    @settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(seed=st.integers(0, 2**32))
    def bombard(seed: int) -> None:
        Bombardment(served.target, recording, findings, seed).burst(80)
        house.check(findings)
        assert not findings.wrong, "\n".join(findings.wrong)

    bombard()
    # Not all of it is refused for the same thing, and some of it is no worse than what others send.
    assert len(findings.told) > 10, findings.told
    assert findings.told["OK"], findings.told


def test_peers_that_do_not_speak_grpc_harm_nobody(served: Served, house: House) -> None:
    findings = Findings()
    ports = int(served.target.rpartition(":")[2]), int(served.http.rpartition(":")[2])
    for seed in range(2):
        garbage.volley(*ports, random.Random(seed))
        house.check(findings)
    assert not findings.wrong, "\n".join(findings.wrong)


def test_a_compressed_bomb_is_not_inflated(served: Served, house: House) -> None:
    house.answers()
    before = house.holds()["front"]
    with grpc.insecure_channel(served.target, options=[("grpc.max_send_message_length", -1)]) as channel:
        call = channel.unary_unary(GRADIENT_METHODS["Evaluate"].path)
        with pytest.raises(grpc.RpcError) as caught:
            call(bytes(512 * MIB), compression=grpc.Compression.Gzip, timeout=60)
    assert caught.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNIMPLEMENTED)
    assert house.holds()["front"] - before < 64 * MIB


@pytest.mark.parametrize("method", ["Check", "Watch"])
def test_a_probe_that_is_none_is_told_so_and_fills_no_log(served: Served, house: House, method: str) -> None:
    with grpc.insecure_channel(served.target) as channel:
        call = channel.unary_stream(f"/grpc.health.v1.Health/{method}")(b"\xff\xff", timeout=30)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not house.complaints()


# In this process.


def examples(name: str, recording: Recording) -> list[bytes]:
    found = seeds(name, recording.unary, recording.sessions)
    assert found
    return found


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_comes_out_of_what_reads_bytes_but_what_is_documented(name: str, recording: Recording) -> None:
    target, known = TARGETS[name], examples(name, recording)
    for data in known:
        target(data)

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(data=st.binary(max_size=300), seed=st.integers(0, 2**32))
    @example(data=b"", seed=0)
    def attack(data: bytes, seed: int) -> None:
        target(data)
        if target.mutate is not None:
            rng = random.Random(seed)
            target(target.mutate(rng.choice(known), rng))

    attack()


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
@pytest.mark.parametrize("name", TARGETS)
def test_coverage_guided(name: str, recording: Recording, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for index, data in enumerate(examples(name, recording)):
        (corpus / str(index)).write_bytes(data)
    command = [sys.executable, "-m", "tests.fuzz", name, str(corpus), f"-max_total_time={SECONDS}", "-seed=1"]
    command.append(f"-artifact_prefix={tmp_path}/")
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=100)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert "Done " in ran.stderr


# What was once found.


def quick(read: Callable[[], object], *raises: type[Exception]) -> Exception:
    """What `read` raises. It must not take longer than any of these could with a bound."""
    began = time.process_time()
    with pytest.raises(raises) as caught:
        read()
    # Without a bound these take minutes, and gigabytes.
    assert time.process_time() - began < 10
    assert len(str(caught.value)) < 6 * MIB
    return caught.value


def test_a_request_of_very_many_fields_is_not_walked_through() -> None:
    error = quick(lambda: split(b"\xa2\x06\x00" * (64 * MIB // 3), bounded=True), WireError)
    assert str(MAX_FIELDS) in str(error)
    # As many as the limit allows are read.
    _, payloads = split(b"\xa2\x06\x00" * MAX_FIELDS, bounded=True)
    assert len(payloads) == MAX_FIELDS


def test_a_request_that_is_not_tensors_is_bounded() -> None:
    large = pb.EvaluateRequest(function={"model": "x" * MAX_DESCRIPTION}).SerializeToString()
    error = quick(lambda: decode(pb.EvaluateRequest, large, bounded=True), WireError)
    assert str(MAX_DESCRIPTION) in str(error)
    # Payloads do not count.
    decode(pb.EvaluateRequest, encode(b"", [bytes(MAX_DESCRIPTION + 1)]), bounded=True)
    # Answers are not bounded: the client trusts its server.
    decode(pb.EvaluateRequest, large)


@pytest.mark.parametrize(
    ("wrt", "part"),
    [
        ([f"*{'?' * (index // 256)}{chr(256 + index)}*" for index in range(20_000)], "patterns"),
        (["*" * 1_000_000 + "[!x]"], "characters"),
        ([f"{index}" for index in range(100_000)] + ["0"], "'0'"),
    ],
    ids=["many globs", "a long glob", "many names"],
)
def test_wrt_of_very_many_words(wrt: list[str], part: str) -> None:
    request = pb.ComputeVjpRequest(function={"model": "small"}, wrt=wrt).SerializeToString()
    error = quick(lambda: TARGETS["job"].run(b"\x01" + request), Fault, WireError)
    assert part in str(error) or "missing" in str(error)


@pytest.mark.parametrize(
    "text",
    ["[" * 900 + "]" * 900, '{"a":' * 200 + "1" + "}" * 200, '{"a":"' + "x" * MIB + '"}', '{"a":' + "9" * 5000 + "}"],
    ids=["deep lists", "deep objects", "long", "a long number"],
)
def test_options_of_an_operation_are_bounded(text: str) -> None:
    frame = session.SessionRequest(op=2, call=session.CallOp(operation="index", options_json=text, handles=[1]))
    error = quick(lambda: TARGETS["op"].run(frame.SerializeToString()), Fault)
    assert isinstance(error, Fault)
    assert error.field == "call.options_json"


def test_options_of_a_loss_are_bounded() -> None:
    options = struct_pb2.Struct()
    options["weights"] = [float(number) for number in range(50_000)]
    frame = session.SessionRequest(
        op=2, call=session.CallOp(loss={"name": "mse_loss", "options": options}, handles=[1])
    )
    error = quick(lambda: TARGETS["op"].run(frame.SerializeToString()), Fault)
    assert "options" in str(error)


def test_a_very_long_name_is_not_compared_with_those_there_are() -> None:
    request = pb.ComputeVjpRequest(function={"model": "cube"}, wrt=["y" * (MAX_DESCRIPTION - 100)])
    quick(lambda: TARGETS["job"].run(b"\x01" + request.SerializeToString()), Fault)
