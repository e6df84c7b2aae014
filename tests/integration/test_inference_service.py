"""What surrounds calls of the Open Inference Protocol: rights, streams, logs, metrics, health, the server's end."""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from grpc_health.v1 import health_pb2
from prometheus_client.parser import text_string_to_metric_families
from safetensors.numpy import save_file
from tests.inference_wire import Caller, arrays, infer
from tests.serving import Served

from pullback_server import Server
from pullback_server.rpc import new_key
from pullback_wire import MODEL_METHODS
from pullback_wire.inference import INFERENCE_METHODS, INFERENCE_SERVICE
from pullback_wire.inference import open_inference_pb2 as pb

MODELS = """
import time, torch
from pullback_server import model

@model("square", batch_axis=0)
def square(x):
    return x * x

@model("slow")
def slow(x):
    time.sleep(1.0)
    return x + 1

@model("secret")
def secret(x):
    return x * 3
"""
#: One that can be unloaded; `a` tells its versions apart.
SCALE = """
import torch
from pullback_server import model

@model("scale")
class Scale(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    def forward(self, x):
        return self.a * x
"""
X = np.arange(3.0)[None]
CODE = grpc.StatusCode


class Rig:
    """A server that knows its callers, and their tokens."""

    def __init__(self, folder: Path) -> None:
        (folder / "models.py").write_text(MODELS)
        self.scale = folder / "repository/scale"
        self.scale.mkdir(parents=True)
        (self.scale / "model.py").write_text(SCALE)
        (self.scale / "model.toml").write_text("")
        self.put("1", 2.0)
        self.tokens: dict[str, str] = {}
        text = '[anonymous]\nrights = ["metrics"]\n'
        for name, rights, models, quota in (
            ("alice", ["call"], ["square", "slow", "nothing"], {}),
            ("holder", ["session"], ["*"], {}),
            ("scraper", ["metrics"], ["*"], {}),
            ("few", ["call"], ["*"], {"bytes_per_second": 4000.0}),
            ("many", ["call", "admin"], ["*"], {}),
            ("leaver", ["call"], ["*"], {}),
        ):
            self.tokens[name], entry = new_key(name, rights, models, quota)
            text += entry
            if name == "leaver":
                self.rest, self.leaver = text.removesuffix(entry), entry
        self.file = folder / "principals.toml"
        self.file.write_text(text)
        options = (
            "--principals",
            "principals.toml",
            "--repository",
            "repository",
            "--repository-mode",
            "explicit",
            "--load-model",
            "scale",
            "--devices",
            "cpu:2",
            "--access-log",
            "--log-format",
            "json",
        )
        self.served = Served(folder, "models.py", *options)

    def caller(self, name: str | None) -> Caller:
        metadata = [] if name is None else [("authorization", f"Bearer {self.tokens[name]}")]
        return Caller(self.served.target, metadata)

    def put(self, version: str, a: float) -> None:
        """A version of `scale`."""
        partial = self.scale / "partial"
        partial.mkdir()
        save_file({"a": np.array(a)}, partial / "weights.safetensors")
        partial.rename(self.scale / version)

    def admin(self, name: str, /, **about: Any) -> None:
        """A call of ModelService."""
        method, many = MODEL_METHODS[name], self.caller("many")
        data = method.request(**about).SerializeToString()
        many.channel.unary_unary(method.path)(data, timeout=60, metadata=many.metadata)

    def lines(self) -> list[dict[str, Any]]:
        """Of the access log."""
        found = [json.loads(line) for line in self.served.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in found if line.get("logger") == "pullback_server.access"]

    def sample(self, name: str, **labels: str) -> float:
        for family in text_string_to_metric_families(self.served.get("/metrics")):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return float(sample.value)
        return 0.0


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    rig = Rig(tmp_path_factory.mktemp("served"))
    yield rig
    rig.served.process.kill()
    rig.served.process.wait()


def code_of(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


def eventually(read: Any, expected: Any) -> None:
    until = time.monotonic() + 30
    while read() != expected:
        assert time.monotonic() < until, read()
        time.sleep(0.05)


# Rights.


def test_probes_are_open_and_nothing_else_is(rig: Rig) -> None:
    nobody = rig.caller(None)
    assert nobody.call("ServerLive", pb.ServerLiveRequest()).live
    assert nobody.call("ServerReady", pb.ServerReadyRequest()).ready
    for name, method in INFERENCE_METHODS.items():
        if name not in ("ServerLive", "ServerReady"):
            assert code_of(lambda m=method: nobody.call(m.name, m.request()))[0] is CODE.UNAUTHENTICATED, name
    assert code_of(lambda: list(nobody.stream(iter([infer("square", {"x": X})]))))[0] is CODE.UNAUTHENTICATED


def test_rights_of_principals(rig: Rig) -> None:
    request = infer("square", {"x": X})
    np.testing.assert_array_equal(rig.caller("alice").infer("square", {"x": X})["output"], X * X)
    # Without the right to call there is no computing, but metadata, as of our own services.
    holder = rig.caller("holder")
    assert code_of(lambda: holder.call("ModelInfer", request))[0] is CODE.PERMISSION_DENIED
    assert code_of(lambda: list(holder.stream(iter([request]))))[0] is CODE.PERMISSION_DENIED
    assert holder.call("ModelReady", pb.ModelReadyRequest(name="secret")).ready
    assert code_of(lambda: rig.caller("scraper").call("ServerMetadata", pb.ServerMetadataRequest()))[0] is (
        CODE.PERMISSION_DENIED
    )


@pytest.mark.parametrize("suffix", ["", "@vjp", "@nothing"])
def test_a_foreign_model_answers_as_one_that_does_not_exist(rig: Rig, suffix: str) -> None:
    alice = rig.caller("alice")

    def told(name: str) -> set[tuple[grpc.StatusCode, str]]:
        whole = name + suffix
        requests = [
            ("ModelInfer", infer(whole, {"x": X})),
            ("ModelMetadata", pb.ModelMetadataRequest(name=whole)),
            ("ModelConfig", pb.ModelConfigRequest(name=whole)),
            ("ModelReady", pb.ModelReadyRequest(name=whole)),
        ]
        found = {code_of(lambda m=method, r=request: alice.call(m, r)) for method, request in requests}
        return {(code, text.replace(name, "NAME")) for code, text in found}

    assert told("secret") == told("absent")
    assert {code for code, _ in told("secret")} == {CODE.PERMISSION_DENIED}
    # In a stream as well.
    answers = list(alice.stream(iter([infer(f"{name}{suffix}", {"x": X}) for name in ("secret", "absent")])))
    first, second = (answer.error_message for answer in answers)
    assert first.replace("secret", "absent") == second
    assert "[PERMISSION_DENIED]" in first
    # One that is theirs may be told to be missing, with no name of others.
    code, text = code_of(lambda: alice.infer("nothing", {"x": X}))
    assert (code, "secret" in text) == (CODE.NOT_FOUND, False)


def test_the_index_shows_what_is_the_callers(rig: Rig) -> None:
    index = rig.caller("alice").call("RepositoryIndex", pb.RepositoryIndexRequest())
    assert [model.name for model in index.models] == ["slow", "square"]


def test_what_was_known_from_somebody_else_is_nobodys_right(rig: Rig) -> None:
    """The same bytes, sent first by one who may."""
    request = infer("secret", {"x": X})
    np.testing.assert_array_equal(arrays(rig.caller("few").call("ModelInfer", request))["output"], 3 * X)
    assert code_of(lambda: rig.caller("alice").call("ModelInfer", request))[0] is CODE.PERMISSION_DENIED


def test_quotas_count_what_comes_on_streams(rig: Rig) -> None:
    time.sleep(1)
    big = infer("square", {"x": np.zeros((1, 1000))})
    answers = list(rig.caller("few").stream(iter([big] * 4)))
    assert any("[QUOTA_EXCEEDED]" in answer.error_message for answer in answers)


# Streams.


def test_a_stream_answers_in_order_and_survives_failures(rig: Rig) -> None:
    requests = []
    for number in range(60):
        good = infer("square", {"x": X + number}, id=str(number), raw=bool(number % 3))
        requests.append(infer("square", {"z": X}, id=str(number)) if number % 7 == 3 else good)
    answers = list(rig.caller("alice").stream(iter(requests)))
    assert [answer.infer_response.id for answer in answers] == [str(number) for number in range(60)]
    for number, answer in enumerate(answers):
        if number % 7 == 3:
            assert answer.error_message.endswith("[BAD_NAME]"), answer
            assert not answer.infer_response.outputs
        else:
            assert not answer.error_message
            assert answer.infer_response.parameters["triton_final_response"].bool_param
            np.testing.assert_array_equal(arrays(answer.infer_response)["output"], (X + number) ** 2)


def test_a_slow_request_comes_before_a_quick_one_that_was_sent_later(rig: Rig) -> None:
    requests = [infer("slow", {"x": X}, id="slow"), infer("square", {"x": X}, id="quick")]
    answers = list(rig.caller("alice").stream(iter(requests)))
    assert [answer.infer_response.id for answer in answers] == ["slow", "quick"]


def test_a_strict_stream_ends_with_the_first_failure(rig: Rig) -> None:
    requests = [infer("square", {"x": X}), infer("square", {"z": X}), infer("square", {"x": X})]
    call = rig.caller("alice").stream(iter(requests), metadata=[("triton_grpc_error", "true")])
    assert not next(call).error_message
    code, text = code_of(lambda: next(call))
    assert (code, "'z'" in text) == (CODE.INVALID_ARGUMENT, True)


def test_a_stream_that_sends_garbage_goes_on(rig: Rig) -> None:
    alice = rig.caller("alice")
    call = alice.channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
    good = infer("square", {"x": X}).SerializeToString()
    answers = list(call(iter([b"\xff\xff", good, b"", good[:-3]]), timeout=60, metadata=alice.metadata))
    found = [pb.ModelStreamInferResponse.FromString(answer) for answer in answers]
    assert [bool(answer.error_message) for answer in found] == [True, False, True, True]


def test_a_large_answer_is_one_message(rig: Rig) -> None:
    x = np.random.default_rng(0).normal(size=(2, 300_000))
    (answer,) = rig.caller("alice").stream(iter([infer("square", {"x": x})]))
    np.testing.assert_array_equal(arrays(answer.infer_response)["output"], x * x)


def test_a_client_that_leaves_leaves_nothing_behind(rig: Rig) -> None:
    feed: queue.Queue[Any] = queue.Queue()
    call = rig.caller("alice").stream(iter(feed.get, None))
    for _ in range(5):
        feed.put(infer("slow", {"x": X}))
    eventually(lambda: rig.sample("pullback_requests_in_flight", method="ModelStreamInfer") > 0, True)
    call.cancel()
    feed.put(None)
    for gauge in ("pullback_requests_in_flight", "pullback_queue_length", "pullback_bytes_in_flight"):
        labels = {"method": "ModelStreamInfer"} if gauge.endswith("requests_in_flight") else {}
        eventually(lambda gauge=gauge, labels=labels: rig.sample(gauge, **labels), 0.0)


def test_names_of_models_that_there_are_not_are_not_kept(rig: Rig) -> None:
    """A stream may last for days, and a caller may make up as many names."""
    feed: queue.Queue[Any] = queue.Queue()
    call = rig.caller("many").stream(iter(feed.get, None))
    front = psutil.Process(rig.served.process.pid)
    before = front.memory_info().rss
    for number in range(16):
        feed.put(infer(f"{number}" + "x" * (3 << 20), {"x": X}))
        assert "[MODEL_NOT_FOUND]" in next(call).error_message
    # Each was held several times over.
    assert front.memory_info().rss - before < 16 * (3 << 20) * 2
    feed.put(None)
    assert not list(call)


def test_clients_that_vanish_are_no_failure_of_the_server(rig: Rig) -> None:
    big = infer("square", {"x": np.zeros((1, 1 << 19))})
    for _ in range(3):
        alice = rig.caller("alice")
        list(alice.stream(iter([infer("square", {"x": X})])))
        call = alice.stream(iter([big] * 8))
        # It is not read, so that the server is about to write.
        eventually(lambda: rig.sample("pullback_requests_in_flight", method="ModelStreamInfer"), 0.0)
        time.sleep(0.3)
        call.cancel()
        alice.channel.close()
    time.sleep(0.3)
    assert "failed inside the server" not in rig.served.log.read_text()


def test_a_client_that_does_not_read_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    (tmp_path / "big.py").write_text(MODELS)
    with Server(tmp_path / "big.py", threads=1, max_call_seconds=2.0) as server:
        caller = Caller(server.target)
        call = caller.stream(iter([infer("square", {"x": np.zeros((1, 1 << 19))})] * 40))
        next(call)
        time.sleep(3)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
    assert caught.value.code() is CODE.DEADLINE_EXCEEDED
    assert "has not read" in caught.value.details()


def test_an_open_stream_ends_with_the_right_to_it(rig: Rig) -> None:
    feed: queue.Queue[Any] = queue.Queue()
    call = rig.caller("leaver").stream(iter(feed.get, None))
    feed.put(infer("square", {"x": X}))
    assert not next(call).error_message
    rig.file.write_text(rig.rest)
    code, text = code_of(lambda: next(call))
    assert (code, "token" in text) == (CODE.UNAUTHENTICATED, True)
    feed.put(None)


# What is told of calls.


def test_calls_are_counted_and_logged(rig: Rig) -> None:
    alice = rig.caller("alice")
    alice.metadata = (*alice.metadata, ("pullback-request-id", "triton-7"))
    counted = {"method": "ModelInfer", "model": "square", "code": "OK"}
    before = rig.sample("pullback_requests_total", **counted)
    alice.infer("square@vjp", {"x": X, "grad_output:output": X})
    assert rig.sample("pullback_requests_total", **counted) == before + 1
    assert rig.sample("pullback_stage_duration_seconds_count", model="square", stage="backward") >= 1
    assert rig.sample("pullback_gradient_norm_count", model="square") >= 1
    code_of(lambda: alice.infer("square", {"z": X}))
    list(alice.stream(iter([infer("square", {"x": X})] * 2)))
    eventually(lambda: len([line for line in rig.lines() if line["request_id"].startswith("triton-7")]), 4)
    lines = [line for line in rig.lines() if line["request_id"].startswith("triton-7")]
    assert [(line["method"], line["code"], line["model"], line["caller"]) for line in lines] == [
        ("ModelInfer", "OK", "square", "alice"),
        ("ModelInfer", "INVALID_ARGUMENT", "square", "alice"),
        ("ModelStreamInfer", "OK", "square", "alice"),
        ("ModelStreamInfer", "OK", "square", "alice"),
    ]
    # A stream's requests can be told from one another.
    assert {line["request_id"] for line in lines[2:]} == {"triton-7/1", "triton-7/2"}
    assert "ModelInfer" in rig.served.get("/")


@pytest.mark.parametrize("length", [0, 1, 120, 126, 128, 129])
def test_ids_of_any_length(rig: Rig, length: int) -> None:
    """What stands behind the id of a stream makes none too long; one that is none is refused as elsewhere."""
    alice = rig.caller("alice")
    alice.metadata = (*alice.metadata, ("pullback-request-id", "i" * length))
    if not 1 <= length <= 128:
        assert code_of(lambda: list(alice.stream(iter([infer("square", {"x": X})]))))[0] is CODE.INVALID_ARGUMENT
        return
    answers = list(alice.stream(iter([infer("square", {"x": X})] * 11)))
    assert [answer.error_message for answer in answers] == [""] * 11
    expected = "i" * min(length, 125) + "/11"
    eventually(lambda: any(line["request_id"] == expected for line in rig.lines()), True)


def test_a_model_that_was_known_changes_and_goes(rig: Rig) -> None:
    """Requests that are known by their bytes are about the model that there is now."""
    many = rig.caller("many")
    given = {"x": X, "grad_output:output": np.ones_like(X)}

    def grad() -> float:
        return float(many.infer("scale@vjp", given, outputs=["grad:x"])["grad:x"][0, 0])

    assert [grad(), grad()] == [2.0, 2.0]
    rig.put("2", 3.0)
    rig.admin("LoadModel", name="scale")
    eventually(grad, 3.0)
    assert many.call("ModelMetadata", pb.ModelMetadataRequest(name="scale@vjp")).versions[-1] == "2"
    rig.admin("UnloadModel", name="scale")
    for _ in range(2):
        code, text = code_of(grad)
        assert (code, "model_name" in text) == (CODE.NOT_FOUND, True), text
    assert not many.call("ModelReady", pb.ModelReadyRequest(name="scale@vjp")).ready


def test_timings_and_request_ids_come_back(rig: Rig) -> None:
    alice = rig.caller("alice")
    call = alice.channel.unary_unary(INFERENCE_METHODS["ModelInfer"].path)
    _, called = call.with_call(
        infer("square", {"x": X}).SerializeToString(), timeout=60, metadata=(*alice.metadata, ("pullback-timings", "1"))
    )
    trailers = dict(called.trailing_metadata())
    assert trailers["pullback-request-id"]
    assert set(json.loads(trailers["pullback-timings"])["stages"]) >= {"decode", "queue", "forward", "encode"}


def test_health_knows_the_service(rig: Rig) -> None:
    check = rig.caller(None).channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        health_pb2.HealthCheckRequest.SerializeToString,
        health_pb2.HealthCheckResponse.FromString,
    )
    answer = check(health_pb2.HealthCheckRequest(service=INFERENCE_SERVICE), timeout=30)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


# The last test: it ends the server.


def test_the_end_of_the_server(rig: Rig) -> None:
    """An idle stream does not hold up the end; what was begun is answered first."""
    alice = rig.caller("alice")
    feed: queue.Queue[Any] = queue.Queue()
    call = alice.stream(iter(feed.get, None))
    feed.put(infer("square", {"x": X}))
    assert not next(call).error_message
    feed.put(infer("slow", {"x": X}))
    eventually(lambda: rig.sample("pullback_requests_in_flight", method="ModelStreamInfer"), 1.0)
    began = time.monotonic()
    rig.served.process.terminate()
    np.testing.assert_array_equal(arrays(next(call).infer_response)["output"], X + 1)
    code, text = code_of(lambda: next(call))
    assert (code, "shutting down" in text) == (CODE.UNAVAILABLE, True)
    assert rig.served.process.wait(60) == 0
    # The grace period is longer.
    assert time.monotonic() - began < 25
    feed.put(None)
