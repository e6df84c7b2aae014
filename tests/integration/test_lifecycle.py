"""Versions that come and go while calls, merged calls and sessions go on: real servers that follow a real folder."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file
from tests.serving import EVERYBODY, Served, command

import pullback as pb
from pullback_server.rpc import new_key
from pullback_wire import MODEL_METHODS, TensorWriter, decode, encode_message
from pullback_wire.v1 import gradient_service_pb2, model_service_pb2

MANIFEST = """
batch_axis = 0
[inputs.x]
dtype = "float64"
shape = ["batch", 3]
[versions]
{policy}
"""

SCALE = '''
import torch
from torch import nn
from pullback_server import model

@model("scale")
class Scale(nn.Module):
    """x -> a x^2 by rows; `a` is what tells versions apart."""
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.big = nn.Parameter(torch.zeros({big}))
    def forward(self, x):
        return self.a * x * x
'''


def put(root: Path, name: str, number: int, a: float, *, policy: str = "latest = 1", big: int = 1) -> None:
    """A version whose gradient is 2 a x, put in its place as an operator should: by renaming."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    text = MANIFEST.format(policy=policy)
    if not (folder / "model.toml").exists() or (folder / "model.toml").read_text() != text:
        (folder / "model.toml").write_text(text)
    if not (folder / "model.py").exists():
        (folder / "model.py").write_text(SCALE.format(big=big))
    partial = folder / f"{number}.partial"
    partial.mkdir()
    save_file({"a": torch.tensor(a, dtype=torch.float64), "big": torch.zeros(big)}, partial / "weights.safetensors")
    place = folder / str(number)
    if place.exists():
        shutil.rmtree(place)
    partial.rename(place)


def until(condition: Callable[[], bool], what: str, seconds: float = 40.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


class Watched:
    """A server that follows a folder, and a client of it."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.root = folder / "repository"
        self.root.mkdir(exist_ok=True)
        self.folder = folder
        self.flags = flags

    def start(self) -> Watched:
        self.served = Served(
            self.folder, "--repository", str(self.root), "--repository-mode", "poll",
            "--repository-poll-seconds", "0.2", "--repository-settle-seconds", "0.5", *self.flags,
        )  # fmt: skip
        self.client = pb.connect(self.served.target)
        return self

    def stop(self) -> None:
        self.client.close()
        self.served.process.terminate()
        self.served.process.wait(20)

    def model(self, name: str = "scale") -> model_service_pb2.Model:
        method = MODEL_METHODS["GetModel"]
        call = self.served.channel.unary_unary(method.path)
        answer = call(model_service_pb2.GetModelRequest(name=name).SerializeToString(), timeout=20)
        return decode(method.response, answer)[0].model

    def status(self, number: int, name: str = "scale") -> model_service_pb2.VersionStatus | None:
        found = [one for one in self.model(name).version_statuses if one.version == str(number)]
        return found[0] if found else None

    def serves(self, number: int, revision: int = 0) -> bool:
        found = self.status(number)
        return found is not None and found.state == model_service_pb2.MODEL_STATE_READY and found.revision == revision

    def vjp(self, version: str = "") -> tuple[str, int, float]:
        """The version and revision that answered, and its factor."""
        writer = TensorWriter()
        x = np.full((2, 3), 0.5)
        request = gradient_service_pb2.ComputeVjpRequest(
            function={"model": "scale", "version": version},
            inputs=[writer.add("x", x)],
            cotangents=[writer.add("output", np.ones_like(x))],
        )
        call = self.served.channel.unary_unary("/pullback.v1.GradientService/ComputeVjp")
        answer, payloads = decode(
            gradient_service_pb2.ComputeVjpResponse, call(encode_message(request, writer.payloads), timeout=30)
        )
        gradient = np.frombuffer(payloads[answer.gradients[0].value.payload])
        assert np.ptp(gradient) < 1e-12
        return answer.model_version, answer.model_revision, float(gradient[0])


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    found = Watched(tmp_path)
    put(found.root, "scale", 1, 1.0)
    found.start()
    yield found
    found.stop()


def test_versions_replace_one_another_while_calls_go_on(watched: Watched) -> None:
    factors = {("1", 0): 1.0, ("2", 0): 2.0, ("2", 1): 3.0, ("1", 1): 1.0}
    failures: list[object] = []
    answered: set[tuple[str, int]] = set()
    stop = threading.Event()

    def call() -> None:
        while not stop.is_set():
            try:
                version, revision, factor = watched.vjp()
            except Exception as error:
                failures.append(error)
                return
            answered.add((version, revision))
            if abs(factor - factors[version, revision]) > 1e-12:
                failures.append((version, revision, factor))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    try:
        put(watched.root, "scale", 2, 2.0)
        until(lambda: watched.serves(2), "version 2 comes")
        # Version 1 goes, since the policy is the latest one.
        until(lambda: watched.status(1) is None, "version 1 goes")
        put(watched.root, "scale", 2, 3.0)
        until(lambda: watched.serves(2, 1), "version 2 is replaced")
        shutil.rmtree(watched.root / "scale" / "2")
        until(lambda: watched.serves(1, 1), "version 1 comes back")
    finally:
        stop.set()
        for caller in callers:
            caller.join()
    assert not failures, failures[:3]
    assert {("1", 0), ("2", 0), ("2", 1)} <= answered


def test_a_version_that_does_not_load_leaves_the_old_one_serving_and_says_why(watched: Watched) -> None:
    folder = watched.root / "scale" / "2"
    folder.mkdir()
    save_file({"b": torch.zeros(1)}, folder / "weights.safetensors")
    until(lambda: (found := watched.status(2)) is not None and found.state == model_service_pb2.MODEL_STATE_FAILED,
          "version 2 fails")  # fmt: skip
    assert watched.vjp() == ("1", 0, 1.0)
    status = watched.status(2)
    assert status is not None
    assert "weights.safetensors" in status.reason
    assert "'b'" in status.reason
    assert watched.model().state == model_service_pb2.MODEL_STATE_READY
    with pytest.raises(grpc.RpcError, match=r"version 2 could not be loaded"):
        watched.vjp("2")
    # As it is it is not tried again; mended, it is.
    put(watched.root, "scale", 2, 5.0)
    until(lambda: watched.serves(2), "version 2 is mended")
    assert watched.vjp() == ("2", 0, 5.0)


def test_a_model_that_kills_its_process_kills_no_worker(watched: Watched) -> None:
    pid = watched.served.workers[0].pid
    bad = watched.root / "deadly"
    (bad / "1").mkdir(parents=True)
    (bad / "model.py").write_text(
        "import os, signal\nfrom pullback_server import model\n"
        "@model('deadly', kind='factory')\ndef made():\n    os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    (bad / "1" / "note").write_text("nothing else")
    (bad / "model.toml").write_text("")
    until(lambda: _failed(watched, "deadly"), "it fails")
    assert "SIGSEGV" in watched.model("deadly").state_reason
    assert watched.vjp() == ("1", 0, 1.0)
    assert psutil.pid_exists(pid)
    assert "pullback_worker_restarts_total 0.0" in watched.served.get("/metrics")


def _failed(watched: Watched, name: str) -> bool:
    try:
        return watched.model(name).state == model_service_pb2.MODEL_STATE_FAILED
    except Exception:
        return False


def test_a_session_keeps_the_version_that_it_has_named(watched: Watched) -> None:
    model = watched.client.model("scale")
    x = pb.tensor(np.full((1, 3), 0.5), requires_grad=True)
    y = model(x)
    put(watched.root, "scale", 2, 2.0)
    until(lambda: watched.serves(2), "version 2 comes")
    assert watched.vjp()[0] == "2"
    y.sum().backward()
    assert np.allclose(x.grad.numpy(), 1.0)
    # "The latest" is to the session what it was when it first asked.
    again = pb.tensor(np.full((1, 3), 0.5), requires_grad=True)
    model(again).sum().backward()
    assert np.allclose(again.grad.numpy(), 1.0)
    status = watched.status(1)
    assert status is not None and status.state == model_service_pb2.MODEL_STATE_UNLOADING
    with pytest.raises(grpc.RpcError, match="taken out of service"):
        watched.vjp("1")
    watched.client.close()
    until(lambda: watched.status(1) is None, "version 1 goes when its session has ended")


def test_a_replaced_worker_holds_what_the_one_before_it_held(watched: Watched) -> None:
    put(watched.root, "scale", 2, 2.0)
    until(lambda: watched.serves(2), "version 2 comes")
    os.kill(watched.served.workers[0].pid, signal.SIGKILL)
    # The call waits for the replacement, which has the version from its start.
    assert watched.vjp() == ("2", 0, 2.0)
    assert watched.model().placements[0].state == model_service_pb2.MODEL_STATE_READY


def test_the_memory_of_what_is_unloaded_comes_back(tmp_path: Path) -> None:
    big = 8 << 20
    watched = Watched(tmp_path, "--state-dir", str(tmp_path / "state"))
    put(watched.root, "scale", 1, 1.0, big=big)
    watched.start()
    try:
        watched.vjp()
        worker = watched.served.workers[0]

        def private() -> float:
            found = worker.memory_full_info()
            return found.uss / 2**20

        before = private()
        for number in range(2, 6):
            put(watched.root, "scale", number, float(number), big=big)
            until(lambda number=number: watched.serves(number), f"version {number} comes")
            assert watched.vjp() == (str(number), 0, float(number))
            until(lambda number=number: watched.status(number - 1) is None, "the one before goes")
        # Each version has 32 MiB.
        assert private() < before + 48
        copies = list((tmp_path / "state").glob("*/*/weights.safetensors"))
        assert len(copies) == 1
    finally:
        watched.stop()


def test_a_half_copied_version_is_never_served(watched: Watched, tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file({"a": torch.tensor(7.0, dtype=torch.float64), "big": torch.zeros(1)}, whole)
    data = whole.read_bytes()
    folder = watched.root / "scale" / "2"
    folder.mkdir()
    with (folder / "weights.safetensors").open("wb", buffering=0) as file:
        for at in range(0, len(data), 40):
            file.write(data[at : at + 40])
            time.sleep(0.3)
            assert watched.vjp() == ("1", 0, 1.0)
    until(lambda: watched.serves(2), "version 2 comes")
    assert watched.vjp() == ("2", 0, 7.0)
    assert watched.model().digest


def test_a_repository_that_cannot_be_read_any_more_changes_nothing(watched: Watched) -> None:
    hidden = watched.root.with_name("elsewhere")
    watched.root.rename(hidden)
    until(lambda: "cannot be read" in watched.served.log.read_text(), "it is told")
    assert watched.vjp() == ("1", 0, 1.0)
    hidden.rename(watched.root)
    put(watched.root, "scale", 2, 2.0)
    until(lambda: watched.serves(2), "version 2 comes")


class Evil:
    """Runs something when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> object:
        return (Path.touch, (self.canary,))


def malicious(canary: Path, folder: Path) -> dict[str, bytes]:
    """Files that run something when they are loaded without care."""
    pickled = folder / "pickled.pt"
    torch.save({"a": Evil(canary)}, pickled)
    module = torch.nn.Linear(2, 2)
    exported = folder / "exported.pt2"
    torch.export.save(torch.export.export(module, (torch.zeros(1, 2),)), exported)
    evil = folder / "evil.pt2"
    with zipfile.ZipFile(exported) as before, zipfile.ZipFile(evil, "w") as after:
        for name in before.namelist():
            inputs = "sample_inputs" in name
            after.writestr(name, pickled.read_bytes() if inputs else before.read(name))
    return {"pickle": pickled.read_bytes(), "bare pickle": pickle.dumps(Evil(canary)), "pt2": evil.read_bytes()}


def test_a_malicious_file_in_the_path_of_uploads_runs_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    evil = malicious(canary, tmp_path)
    # They are as bad as they should be.
    with contextlib.suppress(Exception):
        torch.export.load(io.BytesIO(evil["pt2"]))
    assert canary.exists()
    canary.unlink()
    uploads = tmp_path / "uploads"
    for number, data in enumerate(evil.values(), 2):
        place = uploads / "scale" / str(number)
        place.mkdir(parents=True)
        # As if somebody had got hold of the folder itself.
        (place / "weights.safetensors").write_bytes(data)
        record = {"architecture": "1", "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "uploaded": ""}
        (place / "upload.json").write_text(json.dumps(record))
    making = command("key", "test", "--rights", "call,admin,upload")
    made = subprocess.run(making, capture_output=True, text=True, check=True)
    (tmp_path / "keys.toml").write_text(made.stdout + EVERYBODY)
    watched = Watched(
        tmp_path, "--uploads", str(uploads), "--principals", str(tmp_path / "keys.toml"), "--no-exit-on-error"
    )
    put(watched.root, "scale", 1, 1.0)
    watched.start()
    try:
        for number in range(2, 5):
            status = watched.status(number)
            assert status is not None
            assert status.state == model_service_pb2.MODEL_STATE_FAILED
        with pb.connect(watched.served.target, token=made.stderr.split()[-1]) as client:
            for number, data in enumerate(evil.values(), 10):
                with pytest.raises(pb.errors.BadUpload, match="no safetensors file"):
                    client.upload_weights("scale", data, number)
        assert watched.vjp() == ("1", 0, 1.0)
    finally:
        watched.stop()
    assert not canary.exists()


def test_a_server_that_stops_waits_for_no_load_and_no_upload(tmp_path: Path) -> None:
    key, entry = new_key("all", ["call", "admin", "upload"], ["*"])
    (tmp_path / "keys.toml").write_text(entry + EVERYBODY)
    root = tmp_path / "repository"
    put(root, "scale", 1, 1.0)
    put(root, "slow", 1, 1.0)
    slow = f"import pathlib, time\npathlib.Path({str(tmp_path / 'loading')!r}).touch()\ntime.sleep(60)\n"
    (root / "slow" / "model.py").write_text(slow)
    served = Served(
        tmp_path, "--repository", str(root), "--repository-mode", "explicit", "--load-model", "scale",
        "--uploads", str(tmp_path / "uploads"), "--principals", "keys.toml",
    )  # fmt: skip
    try:
        metadata = (("authorization", f"Bearer {key}"),)
        header = model_service_pb2.UploadHeader(model="scale", version="2", size_bytes=1000, sha256=bytes(32))
        more = threading.Event()

        def parts(*sent: model_service_pb2.UploadWeightsRequest) -> Iterator[bytes]:
            yield from (part.SerializeToString() for part in sent)
            more.wait(60)

        upload = served.channel.stream_unary("/pullback.v1.ModelService/UploadWeights")
        begun = model_service_pb2.UploadWeightsRequest(header=header)
        load = served.channel.unary_unary(MODEL_METHODS["LoadModel"].path)
        request = model_service_pb2.LoadModelRequest(name="slow").SerializeToString()
        calls = [
            load.future(request, timeout=60, metadata=metadata),
            upload.future(parts(begun), timeout=60, metadata=metadata),
            upload.future(parts(), timeout=60, metadata=metadata),
        ]
        until(lambda: [*(tmp_path / "uploads" / ".incoming").iterdir()] != [], "the upload begins")
        until(lambda: (tmp_path / "loading").exists(), "the load begins")
        began = time.monotonic()
        served.process.send_signal(signal.SIGTERM)
        for call in calls:
            error = call.exception(timeout=15)
            assert isinstance(error, grpc.RpcError)
            assert error.code() is grpc.StatusCode.UNAVAILABLE and "the server is stopping" in error.details()
        assert served.process.wait(20) == 0
        # Well before the grace of 20 seconds has passed.
        assert time.monotonic() - began < 17
        more.set()
        assert not [*(tmp_path / "uploads").glob("*/*")]
    finally:
        served.process.kill()


def test_uploads_that_are_cancelled_give_their_room_back(tmp_path: Path) -> None:
    key, entry = new_key("all", ["call", "upload"], ["*"])
    (tmp_path / "keys.toml").write_text(entry + EVERYBODY)
    root = tmp_path / "repository"
    put(root, "scale", 1, 1.0)
    served = Served(
        tmp_path, "--repository", str(root), "--uploads", str(tmp_path / "uploads"), "--principals", "keys.toml",
        "--max-uploads-bytes", "1000000",
    )  # fmt: skip
    try:
        metadata = (("authorization", f"Bearer {key}"),)
        upload = served.channel.stream_unary("/pullback.v1.ModelService/UploadWeights")
        for at in range(60):
            header = model_service_pb2.UploadHeader(model="scale", version="2", size_bytes=900_000, sha256=bytes(32))
            begun = model_service_pb2.UploadWeightsRequest(header=header).SerializeToString()
            call = upload.future(iter([begun]), timeout=20, metadata=metadata)
            time.sleep(at % 10 / 2000)
            call.cancel()
        until(lambda: not [*(tmp_path / "uploads" / ".incoming").iterdir()], "nothing is left")
        with pb.connect(served.target, token=key) as client:
            data = {"a": np.array(2.0), "big": np.zeros(1, np.float32)}
            assert client.upload_weights("scale", data, 2).state == "ready"
    finally:
        served.process.terminate()
        assert served.process.wait(30) == 0
