"""Administrative calls by the client and by `pullback`: keys, loads, unloads and uploads against real servers."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save, save_file
from tests.serving import EVERYBODY, Served

import pullback as pb
from pullback import errors
from pullback._admin import _UPLOAD
from pullback._cli import main
from pullback_server.rpc import new_key
from pullback_wire.v1 import model_service_pb2 as wire

X = np.array([[1.0, -2.0, 3.0]])
#: Elements that make an upload several pieces long.
BIG = 600_000

MANIFEST = """
[inputs.x]
dtype = "float64"
shape = ["batch", 3]
"""
SCALE = f"""
import torch
from torch import nn
from pullback_server import model

@model("scale")
class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.big = nn.Parameter(torch.zeros({BIG}))
    def forward(self, x):
        return self.a * x * x
"""
SLOW = """
import time
from pathlib import Path
from torch import nn
from pullback_server import model

@model("slow")
class Slow(nn.Module):
    def forward(self, x):
        if x.flatten()[0] == 7.5:
            Path("computing").touch()
            time.sleep(1.5)
        return x * x
"""
TURNED = """
from pullback_server import model

@model("turned")
def turned({}):
    return a / b
"""
BROKEN = "raise RuntimeError('no luck today')\n"
STARTED = """
from pullback_server import model

@model("fixed")
def fixed(x):
    return x * x
"""


def weights(a: float, big: int = BIG) -> dict[str, Any]:
    return {"a": np.array(a), "big": np.zeros(big, np.float32)}


class Rig:
    """A server in mode "explicit", and its keys."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uploads = folder / "uploads"
        self.keys: dict[str, str] = {}
        entries = []
        for name, rights, models in (
            ("all", ["call", "session", "admin", "upload"], ["*"]),
            ("loader", ["call", "admin"], ["*"]),
            ("uploader", ["call", "upload"], ["*"]),
            ("elsewhere", ["admin", "upload"], ["other-*"]),
        ):
            self.keys[name], entry = new_key(name, rights, models)
            entries.append(entry)
        (folder / "keys.toml").write_text("\n".join([*entries, EVERYBODY]))
        self.put("scale", SCALE, MANIFEST, 1, 2)
        self.put("slow", SLOW, "", 1)
        self.put("broken", BROKEN, "", 1)
        (folder / "started.py").write_text(STARTED)
        self.served = Served(
            folder, "started.py", "--repository", "repository", "--repository-mode", "explicit", "--load-model",
            "scale:1", "--load-model", "broken", "--no-exit-on-error", "--uploads", "uploads", "--principals",
            "keys.toml", "--max-upload-bytes", "3000000",
        )  # fmt: skip
        self.target = self.served.target
        self.client = self.connect("all")

    def put(self, name: str, code: str, manifest: str, *numbers: int) -> None:
        root = self.folder / "repository" / name
        root.mkdir(parents=True)
        (root / "model.toml").write_text(manifest)
        (root / "model.py").write_text(code)
        for number in numbers:
            (root / str(number)).mkdir()
            if name == "scale":
                save_file(weights(float(number)), root / str(number) / "weights.safetensors")

    def connect(self, key: str, **settings: Any) -> pb.Client:
        return pb.connect(self.target, token=self.keys.get(key, key), **settings)

    def left(self) -> list[str]:
        """What lies in the uploads folder, finished or not."""
        files = (path.relative_to(self.uploads) for path in self.uploads.rglob("*") if path.is_file())
        return sorted(str(path) for path in files if path.name != ".lock")


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    rig = Rig(tmp_path_factory.mktemp("rig"))
    yield rig
    rig.client.close()
    rig.served.process.terminate()
    assert rig.served.process.wait(30) == 0, rig.served.log.read_text()


@pytest.fixture
def client(rig: Rig) -> Iterator[pb.Client]:
    """Version 1 of "scale" is in service, and that alone."""
    if "1" not in _versions(rig.client):
        rig.client.load_model("scale", 1)
    for one in _versions(rig.client) - {"1"}:
        rig.client.unload_model("scale", one)
    until(lambda: all(one.state != "unloading" for one in rig.client.model("scale").info.version_statuses))
    yield rig.client


def _versions(client: pb.Client) -> set[str]:
    return {version for one in client.models() if one.name == "scale" for version in one.versions}


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def factor(model: pb.RemoteModel) -> float:
    """`a` of the version that answers: the gradient is 2 a x."""
    return float(model.vjp(X, np.ones_like(X)).gradients[0, 0]) / 2


ADMIN: dict[str, Callable[[pb.Client], Any]] = {
    "load": lambda client: client.load_model("scale", 1),
    "unload": lambda client: client.unload_model("scale", 1),
    "upload": lambda client: client.upload_weights("scale", weights(1.0), 77),
}


class TestKeys:
    @pytest.mark.parametrize("call", ADMIN.values(), ids=ADMIN)
    @pytest.mark.parametrize(("key", "told"), [("", "needs the right"), ("not-a-key", "does not know the token")])
    def test_no_key_and_an_unknown_one(self, rig: Rig, call: Callable[[pb.Client], Any], key: str, told: str) -> None:
        with rig.connect(key) as client, pytest.raises(errors.Unauthenticated, match=told) as caught:
            call(client)
        assert isinstance(caught.value, PermissionError)
        assert caught.value.reason == "UNAUTHENTICATED"
        assert "not-a-key" not in str(caught.value)

    @pytest.mark.parametrize(
        ("key", "name"),
        [("loader", "upload"), ("uploader", "load"), ("uploader", "unload"), *(("elsewhere", name) for name in ADMIN)],
    )
    def test_a_key_without_the_right(self, rig: Rig, key: str, name: str) -> None:
        with (
            rig.connect(key) as client,
            pytest.raises(errors.PermissionDenied, match=rf"principal '{key}' has n") as got,
        ):
            ADMIN[name](client)
        assert got.value.reason == "PERMISSION_DENIED"
        assert "1" in _versions(rig.client)
        assert rig.left() == []

    def test_what_nobody_may_needs_no_key_but_a_wrong_one_is_told(self, rig: Rig) -> None:
        with rig.connect("") as client:
            assert client.models()
            assert factor(client.model("scale", 1)) == 1.0
        with rig.connect("not-a-key") as client, pytest.raises(errors.Unauthenticated):
            client.models()

    def test_keys_are_not_logged(self, rig: Rig) -> None:
        log = rig.served.log.read_text()
        assert not [key for key in [*rig.keys.values(), "not-a-key"] if key in log]


def test_administrative_calls_are_off_by_default(zoo: str) -> None:
    with pb.connect(zoo, token="any") as client:
        for call in ADMIN.values():
            with pytest.raises(errors.AdminDisabled, match="--principals"):
                call(client)


class TestLoading:
    def test_load_unload_and_load_anew(self, rig: Rig, client: pb.Client) -> None:
        info = client.load_model("scale", 2)
        assert (info.name, info.version, info.state, info.source) == ("scale", "2", "ready", "python")
        assert info.versions == ("1", "2")
        assert len(info.digest) == 64 and int(info.digest, 16)
        assert info.memory_bytes == 8 + 4 * BIG
        assert [one.worker for one in info.placements] == ["cpu-0"]
        assert {one.name for one in info.checks} >= {"gradient", "second"}
        assert {one.outcome for one in info.checks} <= {"passed", "declared", "noted", "skipped"}
        scale = client.model("scale")
        result = scale.vjp(X, np.ones_like(X))
        assert (result.model_version, result.model_revision) == ("2", info.revision)
        assert factor(client.model("scale", 1)) == 1.0

        save_file(weights(2.5), rig.folder / "repository/scale/2/weights.safetensors")
        again = client.load_model("scale", "2")
        assert again.revision == info.revision + 1
        assert again.digest != info.digest
        result = scale.vjp(X, np.ones_like(X))
        assert (result.model_version, result.model_revision) == ("2", again.revision)
        assert scale.info.revision == again.revision
        assert factor(scale) == 2.5

        assert client.unload_model("scale", 2) is None
        result = scale.vjp(X, np.ones_like(X))
        assert (result.model_version, float(result.gradients[0, 0])) == ("1", 2.0)
        with pytest.raises(errors.VersionNotFound, match="known: 1"):
            factor(client.model("scale", 2))

    def test_a_policy_picks_when_no_version_is_named(self, client: pb.Client) -> None:
        assert client.load_model("scale").version == "2"
        assert client.model("scale").info.versions == ("2",)

    def test_unloading_everything(self, client: pb.Client) -> None:
        scale = client.model("scale")
        client.unload_model("scale")
        with pytest.raises(errors.ModelNotFound, match="scale"):
            scale.evaluate(X)
        until(lambda: not any(one.name == "scale" for one in client.models()))
        assert client.load_model("scale", 1).state == "ready"
        assert factor(scale) == 1.0

    @pytest.mark.parametrize(
        ("call", "kind"),
        [
            (lambda client: client.load_model("nobody"), errors.ModelNotFound),
            (lambda client: client.load_model("scale", 99), errors.VersionNotFound),
            (lambda client: client.unload_model("nobody"), errors.ModelNotFound),
            (lambda client: client.unload_model("scale", 99), errors.VersionNotFound),
            (lambda client: client.load_model("fixed"), errors.NotInRepository),
            (lambda client: client.unload_model("fixed", 1), errors.NotInRepository),
        ],
    )
    def test_what_is_not_there(
        self, client: pb.Client, call: Callable[[pb.Client], Any], kind: type[Exception]
    ) -> None:
        with pytest.raises(kind):
            call(client)

    def test_what_cannot_be_loaded(self, client: pb.Client) -> None:
        with pytest.raises(errors.LoadFailed, match="no luck today"):
            client.load_model("broken")
        (info,) = (one for one in client.models() if one.name == "broken")
        assert (info.state, info.version, info.inputs) == ("failed", "1", ())
        assert "no luck today" in info.state_reason
        assert "failed" in repr(info) and "no luck today" in repr(info)
        broken = client.model("broken")
        assert broken.info.state == "failed"
        for call in (
            lambda: broken.evaluate(X), lambda: broken.vjp((X,), X), lambda: broken.evaluate({"x": X}),
            lambda: broken(X), lambda: broken(x=X), lambda: list(broken.parameters()),
        ):  # fmt: skip
            with pytest.raises(errors.ModelNotFound, match="no luck today"):
                call()
        with pytest.raises(errors.VersionNotFound, match="no luck today"):
            client.model("broken", 1).evaluate(X)

    def test_newer_contents_that_cannot_be_loaded(self, rig: Rig, client: pb.Client) -> None:
        client.load_model("scale", 2)
        file = rig.folder / "repository/scale/2/weights.safetensors"
        before = file.read_bytes()
        try:
            save_file({"other": np.zeros(1)}, file)
            with pytest.raises(errors.LoadFailed, match="other"):
                client.load_model("scale", 2)
            info = client.model("scale", 2).info
            assert info.state == "ready" and "other" in info.state_reason
            assert factor(client.model("scale", 2)) > 0
        finally:
            file.write_bytes(before)

    def test_a_load_while_another_runs(self, rig: Rig, client: pb.Client) -> None:
        save_file(weights(3.0), rig.folder / "repository/scale/2/weights.safetensors")
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(client.load_model, "scale", 2)
            until(lambda: any(one.state == "loading" for one in client.model("scale").info.version_statuses))
            for call in ADMIN.values():
                with pytest.raises(errors.LoadConflict, match="scale") as caught:
                    call(client)
                assert isinstance(caught.value, RuntimeError)
            assert factor(client.model("scale")) == 1.0
            assert first.result().state == "ready"
        assert factor(client.model("scale")) == 3.0
        assert rig.left() == []

    def test_unloading_lets_running_calls_end(self, rig: Rig, client: pb.Client) -> None:
        client.load_model("slow")
        slow = client.model("slow")
        busy = np.array([7.5])
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(slow.vjp, busy, busy)
            until(lambda: 'in_flight{method="ComputeVjp"} 1.0' in rig.served.get("/metrics"))
            client.unload_model("slow")
            with pytest.raises(errors.ModelNotFound, match="slow"):
                slow.evaluate({"x": X})
            assert not running.done()
            np.testing.assert_array_equal(running.result().gradients, 2 * busy * busy)

    def test_sessions_keep_their_version(self, rig: Rig, client: pb.Client) -> None:
        scale = client.model("scale")
        with client.session():
            x = client.tensor(X, requires_grad=True)
            y = scale(x)
            client.load_model("scale", 2)
            two = factor(scale)
            assert two != 1.0
            assert float(scale(x)[0, 0].item()) == 1.0
            client.unload_model("scale", 1)
            assert float(scale(x)[0, 0].item()) == 1.0
            y.backward(gradient=np.ones_like(X))
            assert x.grad is not None
            np.testing.assert_array_equal(x.grad.numpy(), 2 * X)
            with pytest.raises(errors.VersionNotFound):
                client.model("scale", 1).evaluate(X)
        with client.session():
            assert float(scale(client.tensor(X))[0, 0].item()) == two
        until(lambda: client.model("scale").info.version_statuses[0].version == "2")

    def test_positions_in_a_session_mean_what_they_meant(self, rig: Rig, client: pb.Client) -> None:
        """The next version has its inputs the other way round."""
        folder = rig.folder / "repository/turned"
        rig.put("turned", TURNED.format("a, b"), "[versions]\nlatest = 1\n", 1)
        client.load_model("turned")
        turned = client.model("turned")
        with client.session():
            six, two = client.tensor(6.0), client.tensor(2.0)
            assert turned(six, two).item() == 3.0
            (folder / "model.py").write_text(TURNED.format("b, a"))
            (folder / "2").mkdir()
            assert client.load_model("turned").version == "2"
            assert turned(six, two).item() == 3.0
            with pytest.raises(errors.BadName, match="replaced by version 2"):
                turned.evaluate((6.0, 2.0))
            assert float(turned.evaluate((6.0, 2.0))) == pytest.approx(1 / 3)
            assert turned(six, two).item() == 3.0
        with client.session():
            assert turned(client.tensor(6.0), client.tensor(2.0)).item() == pytest.approx(1 / 3)

    def test_signatures_follow_the_version_that_answers(self, rig: Rig, client: pb.Client) -> None:
        scale = client.model("scale")
        assert scale.info.version == "1"
        client.load_model("scale", 2)
        assert scale.info.version == "1"
        scale.evaluate(X)
        assert scale.info.version == "2"


def raw(client: pb.Client, header: dict[str, Any], *data: bytes) -> None:
    """An upload as a client that makes mistakes would send it."""
    parts = [wire.UploadWeightsRequest(header=wire.UploadHeader(**header))] if header else []
    parts += [wire.UploadWeightsRequest(data=one) for one in data]
    stream = iter([part.SerializeToString() for part in parts])
    client._transport.upload(_UPLOAD, lambda begin: bytes(begin(stream).result()), "upload", 30)


class TestUploads:
    def test_every_kind_of_source(self, rig: Rig, client: pb.Client, tmp_path: Path) -> None:
        seen: list[tuple[int, int]] = []
        info = client.upload_weights("scale", weights(10.0), 10, progress=lambda *counts: seen.append(counts))
        assert (info.version, info.state) == ("10", "ready")
        total = seen[-1][1]
        assert seen[-1] == (total, total) and total > 4 * BIG
        assert len(seen) >= 3 and seen == sorted(seen)
        result = client.model("scale").vjp(X, np.ones_like(X))
        assert result.model_version == "10"
        np.testing.assert_array_equal(result.gradients, 20 * X)
        file = tmp_path / "w.safetensors"
        save_file(weights(11.0), file)
        assert client.upload_weights("scale", file, 11).digest != info.digest
        assert factor(client.model("scale", 11)) == 11.0
        stream = io.BytesIO(b"head" + save(weights(12.0)))
        stream.seek(4)
        client.upload_weights("scale", stream, "12", architecture_version=1)
        assert factor(client.model("scale", 12)) == 12.0
        files = ("upload.json", "weights.safetensors")
        assert rig.left() == [f"scale/{number}/{file}" for number in (10, 11, 12) for file in files]
        with pytest.raises(FileExistsError, match="10 already") as caught:
            client.upload_weights("scale", weights(1.0), 10)
        assert caught.value.reason == "VERSION_EXISTS"
        with pytest.raises(errors.VersionExists):
            client.upload_weights("scale", weights(1.0), 1)
        # An upload that was taken out of service is loaded again by its number.
        client.unload_model("scale", 12)
        assert client.load_model("scale", 12).state == "ready"
        assert factor(client.model("scale", 12)) == 12.0

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"sha256": bytes(32)}, "SHA-256"),
            ({"sha256": b"short"}, "5 bytes, expected 32"),
            ({"size_bytes": 100}, "more than the announced 100"),
            ({"size_bytes": 2_900_000}, r"\d+ bytes came, 2900000 were announced"),
            ({"size_bytes": 1 << 50}, "the limit is 3000000"),
            ({"size_bytes": -1}, "no safetensors file is as short"),
            ({"version": "0"}, "expected a number"),
            ({"version": "../../escape"}, "expected a number"),
        ],
    )
    def test_what_is_not_what_its_header_says(
        self, rig: Rig, client: pb.Client, change: dict[str, Any], words: str
    ) -> None:
        left = rig.left()
        data = save(weights(1.0))
        header = {
            "model": "scale", "version": "50", "size_bytes": len(data), "sha256": hashlib.sha256(data).digest()
        } | change  # fmt: skip
        with pytest.raises(errors.BadUpload, match=words) as caught:
            raw(client, header, data[:1_000_000], data[1_000_000:])
        assert isinstance(caught.value, ValueError)
        assert rig.left() == left

    def test_parts_in_the_wrong_order(self, rig: Rig, client: pb.Client) -> None:
        left = rig.left()
        header = {"model": "scale", "version": "50", "size_bytes": 100, "sha256": bytes(32)}
        with pytest.raises(errors.MalformedRequest):
            raw(client, {}, b"data")
        with pytest.raises(errors.MalformedRequest):
            raw(client, {})
        with pytest.raises(errors.BadUpload, match="0 bytes came"):
            raw(client, header)
        assert rig.left() == left

    def test_a_file_that_shrinks_meanwhile(self, rig: Rig, client: pb.Client, tmp_path: Path) -> None:
        file = tmp_path / "w.safetensors"
        save_file(weights(1.0), file)
        left = rig.left()

        def shrink(sent: int, total: int) -> None:
            with file.open("rb+") as opened:
                opened.truncate(1_500_000)

        with pytest.raises(errors.BadUpload, match="1500000 bytes came"):
            client.upload_weights("scale", file, 51, progress=shrink)
        assert rig.left() == left

    @pytest.mark.parametrize(
        ("made", "words"),
        [
            (lambda: {"a": np.array(1.0)}, "big"),
            (lambda: weights(1.0) | {"more": np.zeros(3)}, "more"),
            (lambda: weights(1.0) | {"a": np.array(1.0, np.float32)}, "float32"),
            (lambda: weights(1.0, BIG - 1), str(BIG - 1)),
        ],
        ids=["missing", "unexpected", "dtype", "shape"],
    )
    def test_weights_of_another_architecture(
        self, rig: Rig, client: pb.Client, made: Callable[[], dict[str, Any]], words: str
    ) -> None:
        left = rig.left()
        with pytest.raises((errors.LoadFailed, errors.BadUpload), match=words):
            client.upload_weights("scale", made(), 52)
        assert rig.left() == left
        with pytest.raises(errors.VersionNotFound):
            factor(client.model("scale", 52))
        assert factor(client.model("scale")) == 1.0

    def test_a_pickle_is_not_opened(self, rig: Rig, client: pb.Client, tmp_path: Path) -> None:
        canary = tmp_path / "canary"

        class Evil:
            def __reduce__(self) -> Any:
                return (Path.touch, (canary,))

        left = rig.left()
        with pytest.raises(errors.BadUpload, match="no safetensors file"):
            client.upload_weights("scale", pickle.dumps({"a": Evil()}), 53)
        assert not canary.exists()
        assert rig.left() == left

    def test_too_large(self, rig: Rig, client: pb.Client) -> None:
        with pytest.raises(errors.BadUpload, match="4000000 bytes are announced, the limit is 3000000"):
            client.upload_weights("scale", bytes(4_000_000), 54)

    def test_unknown_architectures(self, client: pb.Client) -> None:
        with pytest.raises(errors.ModelNotFound):
            client.upload_weights("nobody", weights(1.0), 55)
        with pytest.raises(errors.VersionNotFound):
            client.upload_weights("scale", weights(1.0), 55, architecture_version=9)

    @pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
    def test_one_that_is_given_up_half_way(self, rig: Rig, client: pb.Client, kind: type[BaseException]) -> None:
        left = rig.left()

        def give_up(sent: int, total: int) -> None:
            until(lambda: rig.left() != left)
            raise kind("enough")

        threads = threading.active_count()
        with pytest.raises(kind, match="enough"):
            client.upload_weights("scale", weights(1.0), 56, progress=give_up)
        until(lambda: rig.left() == left)
        until(lambda: threading.active_count() <= threads)
        until(lambda: 'in_flight{method="UploadWeights"} 0.0' in rig.served.get("/metrics"))
        assert client.upload_weights("scale", weights(5.0), 56).state == "ready"
        assert factor(client.model("scale", 56)) == 5.0
        # The uploads of these tests stay in the folder; another version for another run of this one.
        client.unload_model("scale", 56)
        for file in (rig.uploads / "scale/56").iterdir():
            file.unlink()

    def test_a_client_that_is_closed_meanwhile(self, rig: Rig, client: pb.Client) -> None:
        left = rig.left()
        with rig.connect("all") as other, pytest.raises(errors.ClientClosed, match="is closed"):
            other.upload_weights("scale", weights(1.0), 57, progress=lambda *_: other.close())
        until(lambda: rig.left() == left)

    def test_time_that_runs_out(self, rig: Rig, client: pb.Client) -> None:
        left = rig.left()
        with pytest.raises(errors.DeadlineExceeded, match=r"upload 'scale' version 58.* within 0\.2 s"):
            client.upload_weights("scale", weights(1.0), 58, timeout=0.2, progress=lambda *_: time.sleep(0.3))
        until(lambda: rig.left() == left)

    def test_a_disk_that_is_full(self, tmp_path: Path) -> None:
        small = tmp_path / "small"
        small.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
        try:
            done = subprocess.run(mount, capture_output=True, check=False)
        except OSError:
            pytest.skip("no mount here")
        if done.returncode:
            pytest.skip("mounting is not permitted here")
        key, entry = new_key("k", ["call", "upload"], ["*"])
        (tmp_path / "keys.toml").write_text(entry + EVERYBODY)
        (tmp_path / "started.py").write_text(SCALE)
        try:
            served = Served(tmp_path, "started.py", "--uploads", str(small), "--principals", "keys.toml")
            try:
                with pb.connect(served.target, token=key) as client:
                    with pytest.raises(errors.StorageFull, match="no room for") as caught:
                        client.upload_weights("scale", weights(1.0), 2)
                    assert isinstance(caught.value, OSError) and isinstance(caught.value, RuntimeError)
                    assert not [one for one in small.rglob("*") if one.is_file() and one.name != ".lock"]
                    np.testing.assert_array_equal(client.model("scale").evaluate(X), X * X)
            finally:
                served.process.terminate()
                assert served.process.wait(30) == 0
        finally:
            subprocess.run(["umount", str(small)], check=True)


class TestCommand:
    def test_load_describe_unload(self, rig: Rig, client: pb.Client, capsys: pytest.CaptureFixture[str]) -> None:
        where = ["--target", rig.target, "--token", rig.keys["loader"]]
        assert main(["load", "scale", "--version", "2", *where]) == 0
        assert capsys.readouterr().out.startswith("scale version 2 revision ")
        assert main(["describe", "scale", *where]) == 0
        out = capsys.readouterr().out
        for words in ("source", "digest", "memory", "checks at load", "gradient: passed", "cpu-0 (cpu)", "2: ready"):
            assert words in out
        assert main(["--json", "unload", "scale", "--version", "2", *where]) == 0
        assert json.loads(capsys.readouterr().out)["unloaded"] is True
        assert main(["upload", "scale", "nowhere.safetensors", "--version", "3", *where]) == 1
        assert "nowhere.safetensors" in capsys.readouterr().err

    def test_upload(
        self,
        rig: Rig,
        client: pb.Client,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("PULLBACK_TOKEN", rig.keys["uploader"])
        file = tmp_path / "w.safetensors"
        save_file(weights(6.0), file)
        arguments = ["upload", "scale", str(file), "--version", "60", "--architecture-version", "1"]
        assert main([*arguments, "--json", "--target", rig.target]) == 0
        out, err = capsys.readouterr()
        info = json.loads(out)
        assert (info["version"], info["state"]) == ("60", "ready")
        assert info["version_statuses"][-1]["digest"] == info["digest"]
        assert err == ""
        assert main([*arguments, "--target", rig.target]) == 1
        assert "60 already" in capsys.readouterr().err

    def test_models_that_failed_are_listed(self, rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["models", "--target", rig.target]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert ["broken", "1", "failed", "-", "-"] in [line.split() for line in lines]
        assert any(line.startswith("broken version 1 is failed: ") and "no luck today" in line for line in lines)
        assert main(["describe", "broken", "--target", rig.target]) == 0
        assert "no luck today" in capsys.readouterr().out
        assert main(["models", "--json", "--target", rig.target]) == 0
        models = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
        assert models["broken"]["version_statuses"][0]["state"] == "failed"
