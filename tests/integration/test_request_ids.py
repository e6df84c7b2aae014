"""Ids of requests, in trailers, errors and every line of the log that is about them; timings for those who ask."""

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from tests.serving import Served

import pullback as pb
from pullback_wire import (
    GRADIENT_METHODS,
    MODEL_METHODS,
    REQUEST_ID_KEY,
    TIMINGS_KEY,
    TensorWriter,
    encode,
    encode_message,
)
from pullback_wire.v1 import gradient_service_pb2, model_service_pb2, session_service_pb2

MODELS = """
import logging
import os
import sys
import warnings

from pullback_server import Batching, model, spec

@model("square", inputs={"x": spec("float64", ["n"])})
def square(x):
    return x * x

@model("chatty", inputs={"x": spec("float64", ["n"])})
def chatty(x):
    if x.shape[0] == 7:
        print("printed")
        print("complained", file=sys.stderr)
        os.write(2, b'{"half": "an object')
        logging.getLogger("models.chatty").warning("said, twice:\\nsaid")
        warnings.warn("perhaps deprecated")
        raise ValueError("as asked")
    return x

@model("moody", inputs={"x": spec("float64", ["n", 3])}, batch_axis=0, batching=Batching(max_rows=2, max_delay=30.0))
def moody(x):
    if bool((x.detach() == 13).any()):
        raise ValueError("thirteen")
    return x**3

print("printed while the models load")
"""
#: Neither may show, in any form.
SECRET = 31415.926535
TOKEN = "hush-this-is-a-token"


class House(NamedTuple):
    served: Served
    client: pb.Client

    def lines(self) -> list[dict[str, Any]]:
        """The log, each line of which is one JSON object."""
        return [json.loads(line) for line in self.served.log.read_text().splitlines()]

    def about(self, id: str, *loggers: str) -> list[dict[str, Any]]:
        """The lines about a request, once each of these loggers has said something."""
        until = time.monotonic() + 30
        while True:
            found = [line for line in self.lines() if line.get("request_id") == id]
            if {line["logger"] for line in found} >= set(loggers):
                return found
            assert time.monotonic() < until, self.served.log.read_text()
            time.sleep(0.02)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("ids")
    (folder / "models.py").write_text(MODELS)
    served = Served(folder, "models.py", "--log-format", "json", "--access-log")
    with pb.connect(served.target, metadata={"authorization": f"Bearer {TOKEN}"}) as client:
        yield House(served, client)
    served.process.terminate()
    assert served.process.wait(30) == 0, served.log.read_text()


def vjp(house: House, metadata: tuple[tuple[str, str], ...], model: str = "square") -> grpc.Future:
    """A bare call: what comes back with it is for the test to see."""
    writer = TensorWriter()
    x = np.array([SECRET, 2.0])
    request = gradient_service_pb2.ComputeVjpRequest(
        function={"model": model}, inputs=[writer.add("x", x)], cotangents=[writer.add("output", x)]
    )
    call = house.served.channel.unary_unary(GRADIENT_METHODS["ComputeVjp"].path)
    return call.future(encode_message(request, writer.payloads), timeout=30, metadata=metadata)


def test_every_answer_has_the_id_that_its_caller_chose_or_a_new_one(house: House) -> None:
    mine = vjp(house, ((REQUEST_ID_KEY, "mine: 1/2"),))
    assert mine.result()
    assert dict(mine.trailing_metadata()) == {REQUEST_ID_KEY: "mine: 1/2"}
    made = set()
    for _ in range(3):
        call = vjp(house, ())
        assert call.result()
        made.add(dict(call.trailing_metadata())[REQUEST_ID_KEY])
    assert len(made) == 3
    assert all(re.fullmatch("[0-9a-f]{16}", id) for id in made)
    listing = house.served.channel.unary_unary(MODEL_METHODS["ListModels"].path)
    answer, call = listing.with_call(model_service_pb2.ListModelsRequest().SerializeToString(), timeout=30)
    assert answer
    assert dict(call.trailing_metadata())[REQUEST_ID_KEY]


def test_errors_have_it_in_the_trailers_and_in_their_details(house: House) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        vjp(house, ((REQUEST_ID_KEY, "lost"),), model="none such").result()
    trailers = dict(caught.value.trailing_metadata())
    assert trailers[REQUEST_ID_KEY] == "lost"
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.metadata["request_id"] == "lost"


@pytest.mark.parametrize("id", ["", "x" * 129])
def test_an_id_that_is_none_is_refused_under_a_new_one(house: House, id: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        vjp(house, ((REQUEST_ID_KEY, id),)).result()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert REQUEST_ID_KEY in caught.value.details()
    assert f"{len(id)} characters" in caught.value.details()
    assert re.fullmatch("[0-9a-f]{16}", dict(caught.value.trailing_metadata())[REQUEST_ID_KEY])
    assert vjp(house, ((REQUEST_ID_KEY, "x" * 128),)).result()


def test_a_name_of_a_megabyte_makes_no_line_of_a_megabyte(house: House) -> None:
    call = vjp(house, ((REQUEST_ID_KEY, "long name"),), model="m" * (1 << 20))
    assert call.code() is grpc.StatusCode.NOT_FOUND
    (line,) = house.about("long name", "pullback_server.access")
    assert line["model"] == "m" * 128


def test_the_clients_errors_carry_it(house: House) -> None:
    with pytest.raises(pb.errors.ModelNotFound) as caught:
        house.client.model("none such").evaluate({"x": np.zeros(2)})
    made = caught.value.request_id
    assert re.fullmatch("[0-9a-f]{16}", made)
    assert made not in str(caught.value)
    assert caught.value.__notes__ == [f"request id: {made}"]
    (line,) = house.about(made, "pullback_server.access")
    assert (line["method"], line["code"], line["model"]) == ("Evaluate", "NOT_FOUND", "none such")
    with pb.request_id("chosen"), pytest.raises(pb.errors.ModelNotFound) as caught:
        house.client.model("none such").evaluate({"x": np.zeros(2)})
    assert caught.value.request_id == "chosen"
    # One that nobody answers has one as well, for the log of whoever did not answer.
    with pb.connect("127.0.0.1:1", retry=pb.RetryPolicy(attempts=1)) as nobody:
        with pytest.raises(pb.errors.Unavailable) as unreached:
            nobody.models()
        assert re.fullmatch("[0-9a-f]{16}", unreached.value.request_id)
    for id in ("", "x" * 129, "two\nlines"):
        with pytest.raises(ValueError, match="1 to 128 printable"), pb.request_id(id):
            pass


def test_all_that_is_said_for_a_call_names_it_in_the_worker_too(house: House) -> None:
    with pb.request_id("chatty one"), pytest.raises(pb.errors.ModelError):
        house.client.model("chatty").evaluate({"x": np.full(7, SECRET)})
    said = {
        line["logger"]: line
        for line in house.about("chatty one", "pullback_server.access", "models.chatty", "py.warnings")
    }
    assert said["models.chatty"]["message"] == "said, twice:\nsaid"
    assert said["models.chatty"]["level"] == "WARNING"
    assert "perhaps deprecated" in said["py.warnings"]["message"]
    trace = said["pullback_server.fleet.jobs"]
    assert trace["level"] == "ERROR"
    assert 'raise ValueError("as asked")' in trace["message"]
    for name in ("models.chatty", "py.warnings", "pullback_server.fleet.jobs"):
        assert said[name]["worker"] == "cpu-0"
    done = said["pullback_server.access"]
    assert (done["method"], done["code"], done["model"]) == ("Evaluate", "INTERNAL", "chatty")
    assert done["seconds"] > 0
    assert done["request_bytes"] > 56
    assert done["response_bytes"] == 0
    assert done["caller"].startswith("ipv4:127.0.0.1:")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", done["time"])


def test_whatever_a_worker_writes_becomes_lines_of_json(house: House) -> None:
    # `lines` parses each of them.
    with pytest.raises(pb.errors.ModelError):
        house.client.model("chatty").evaluate({"x": np.zeros(7)})
    said = [line["message"] for line in house.lines() if line["logger"] == "pullback_server.output"]
    for word in ("printed while the models load", "printed", "complained", '{"half": "an object'):
        assert f"worker cpu-0: {word}" in said


def test_members_of_a_batch_keep_their_ids(house: House) -> None:
    """The one that failed is told by its traceback, which names it and not its neighbour."""
    model = house.client.model("moody")
    assert model.info.inputs

    def ask(value: float) -> None:
        with pb.request_id(f"member {value:g}"):
            model.vjp(np.full((1, 3), value), np.ones((1, 3)))

    with ThreadPoolExecutor(2) as pool:
        good, bad = pool.submit(ask, 2.0), pool.submit(ask, 13.0)
        good.result()
        with pytest.raises(pb.errors.ModelError) as caught:
            bad.result()
    assert caught.value.request_id == "member 13"
    told = house.about("member 13", "pullback_server.fleet.jobs", "pullback_server.access")
    assert any('raise ValueError("thirteen")' in line["message"] for line in told)
    assert {line["logger"] for line in house.about("member 2")} == {"pullback_server.access"}


def test_a_session_and_its_ops(house: House) -> None:
    with pb.request_id("session one"), house.client.session() as session:
        x = pb.tensor(np.full(7, SECRET), requires_grad=True)
        with pytest.raises(pb.errors.ModelError) as caught:
            house.client.model("chatty")(x)
        y = (x * x).sum()
        y.backward()
        with pytest.raises(pb.errors.GraphFreed) as freed:
            y.backward()
    assert session is not None
    first, second = caught.value.request_id, freed.value.request_id
    assert re.fullmatch(r"session one/\d+", first)
    assert re.fullmatch(r"session one/\d+", second)
    assert first != second
    assert {line["logger"] for line in house.about(first, "models.chatty", "pullback_server.fleet.jobs")}
    # The signature was asked for under the same id.
    (line,) = [one for one in house.about("session one", "pullback_server.access") if one.get("method") == "Session"]
    assert line["code"] == "OK"
    assert line["ops"] >= 4
    assert "ops" not in line["message"]


def test_a_bare_session_is_told_its_id_before_it_is_answered(house: House) -> None:
    opening = session_service_pb2.SessionRequest(op=1, open=session_service_pb2.OpenSession())
    closing = session_service_pb2.SessionRequest(close=session_service_pb2.CloseSession())
    stream = house.served.channel.stream_stream("/pullback.v1.SessionService/Session")
    call = stream(iter([encode(opening.SerializeToString(), ()), closing.SerializeToString()]), timeout=30)
    assert next(call)
    assert re.fullmatch("[0-9a-f]{16}", dict(call.initial_metadata())[REQUEST_ID_KEY])
    refused = stream(iter([b"\xff\xff"]), timeout=30, metadata=((REQUEST_ID_KEY, "no session"),))
    with pytest.raises(grpc.RpcError) as caught:
        next(refused)
    assert dict(caught.value.trailing_metadata())[REQUEST_ID_KEY] == "no session"


def test_timings_come_when_they_are_asked_for(house: House) -> None:
    model = house.client.model("square")
    model.vjp(np.ones(3), np.ones(3))
    with pb.record_timings() as timings, pb.request_id("timed"):
        model.vjp(np.ones(3), np.ones(3))
        model.evaluate(np.ones(3))
        with pytest.raises(pb.errors.InvalidArgument):
            model.vjp(np.ones(3), np.ones(4))
    model.vjp(np.ones(3), np.ones(3))
    there, without = timings
    assert there.call == "model 'square': vjp"
    assert there.request_id == "timed"
    assert set(there.stages) == {"decode", "queue", "transfer", "forward", "backward", "encode"}
    assert all(spent >= 0 for spent in there.stages.values())
    assert there.stages["forward"] > 0
    assert there.stages["backward"] > 0
    assert without.stages["backward"] == 0
    # To the seven digits that travel.
    assert sum(there.stages.values()) <= there.seconds + 1e-6
    assert there.seconds <= there.round_trip
    assert there.worker == "cpu-0"
    assert there.batch_rows == 0


def test_timings_tell_of_a_merged_call(house: House) -> None:
    model = house.client.model("moody")
    assert model.info.inputs

    def ask(value: float) -> list[pb.CallTimings]:
        with pb.record_timings() as timings:
            model.vjp(np.full((1, 3), value), np.ones((1, 3)))
        return timings

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(ask, (2.0, 3.0)))
    assert [[one.batch_rows for one in timings] for timings in found] == [[2], [2]]


def test_the_trailer_is_json_and_for_those_alone_who_say_1(house: House) -> None:
    call = vjp(house, ((TIMINGS_KEY, "1"),))
    assert call.result()
    told = json.loads(dict(call.trailing_metadata())[TIMINGS_KEY])
    assert set(told) == {"seconds", "stages", "worker"}
    call = vjp(house, ((TIMINGS_KEY, "0"),))
    assert call.result()
    assert TIMINGS_KEY not in dict(call.trailing_metadata())


def test_the_log_tells_neither_numbers_nor_tokens(house: House) -> None:
    """After all that this module has sent."""
    log = house.served.log.read_bytes()
    assert TOKEN.encode() not in log
    assert b"31415" not in log
    assert np.float64(SECRET).tobytes() not in log
