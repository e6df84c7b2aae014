"""Administrative calls: keys, what travels, what is sent again, and the weights that can be uploaded."""

import hashlib
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tests.both_clients import Connect
from tests.unit.client_server import Failure, Fake, serving

import pullback as pb
from pullback import errors
from pullback._cli import main
from pullback._weights import opened
from pullback_wire import DTYPES, Reason
from pullback_wire.v1 import model_service_pb2

QUICK = pb.RetryPolicy(attempts=3, initial_backoff=0.01)


@pytest.fixture
def fake() -> Iterator[Fake]:
    with serving(Fake()) as fake:
        yield fake


@pytest.fixture
def client(connect: Connect, fake: Fake) -> Iterator[pb.Client]:
    with connect(fake.target, retry=QUICK, token="secret-key") as client:
        yield client


class TestKeys:
    def test_it_goes_with_every_call(self, fake: Fake, client: pb.Client) -> None:
        client.ping()
        client.models()
        client.model("square").evaluate({"x": 1.0})
        client.load_model("square")
        client.unload_model("square")
        client.upload_weights("square", b"12345678", 3)
        assert len(fake.seen) == 6
        assert {seen.metadata["authorization"] for seen in fake.seen} == {"Bearer secret-key"}

    def test_it_is_not_shown(self, client: pb.Client) -> None:
        model = client.model("square")
        assert "secret" not in "".join(map(repr, (client, client._transport.address, model, vars(client))))

    def test_it_comes_from_the_environment(self, connect: Connect, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PULLBACK_TOKEN", "from-outside\n")
        for settings, sent in (
            ({}, "Bearer from-outside"), ({"token": "mine"}, "Bearer mine"), ({"token": ""}, None),
            ({"metadata": {"authorization": "Basic x"}}, "Basic x"),
        ):  # fmt: skip
            with connect(fake.target, **settings) as client:
                client.models()
            assert fake.seen[-1].metadata.get("authorization") == sent

    def test_it_is_never_sent_in_plain_text_to_another_machine(
        self, connect: Connect, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(ValueError, match=r"example:8470 would get it in plain text; give tls=") as caught:
            connect("example:8470", token="secret-key")
        assert "secret" not in str(caught.value)
        connect("example:8470", token="secret-key", tls=pb.TLS()).close()
        connect("example:8470", metadata={"authorization": "Bearer secret-key"}).close()
        for target in ("localhost:1", "127.0.0.1:1", "unix:/run/x", "dns:///localhost:1"):
            connect(target, token="secret-key").close()
        monkeypatch.setenv("PULLBACK_TOKEN", "secret-key")
        with pytest.raises(ValueError, match="PULLBACK_TOKEN"):
            connect("example:8470")
        connect("example:8470", token="").close()

    @pytest.mark.parametrize("settings", [{"token": "snow☃"}, {"token": "a", "metadata": {"Authorization": "b"}}])
    def test_what_cannot_be(self, connect: Connect, settings: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="authorization"):
            connect("localhost:1", **settings)


class TestRepeating:
    """What changes something is made once, unless it is known that nothing of it was sent."""

    @pytest.mark.parametrize("failure", [Failure.of(Reason.NOT_READY, retry_after=0.01), Failure(14, "Socket closed")])
    def test_never_after_a_server_was_reached(self, fake: Fake, client: pb.Client, failure: Failure) -> None:
        for call in (
            lambda: client.load_model("square"),
            lambda: client.unload_model("square"),
            lambda: client.upload_weights("square", bytes(8), 3),
        ):
            fake.failures, fake.seen = [failure], []
            with pytest.raises(errors.Unavailable):
                call()
            assert len(fake.seen) == 1

    def test_until_a_server_is_there(self, connect: Connect, tmp_path: Path) -> None:
        address = f"unix:{tmp_path / 'socket'}"
        retry = pb.RetryPolicy(attempts=50, initial_backoff=0.1, jitter=0)
        up = threading.Event()
        done = threading.Event()

        def serve() -> None:
            up.wait(10)
            with serving(Fake(), address=address):
                done.wait(20)

        thread = threading.Thread(target=serve)
        thread.start()
        threading.Timer(0.3, up.set).start()
        try:
            with connect(address, retry=retry) as client:
                assert client.upload_weights("square", bytes(8), 3).name == "square"
                assert client.load_model("square").name == "square"
        finally:
            done.set()
            thread.join()

    def test_nobody_there(self, connect: Connect) -> None:
        with connect("127.0.0.1:1", retry=QUICK) as client:
            with pytest.raises(errors.Unavailable, match=r"load 'm': 127\.0\.0\.1:1 cannot be reached"):
                client.load_model("m")
            with pytest.raises(errors.Unavailable, match=r"upload 'm' version 1: 127\.0\.0\.1:1 cannot be reached"):
                client.upload_weights("m", bytes(8), 1)


class TestUpload:
    def test_what_travels(self, fake: Fake, client: pb.Client) -> None:
        data = np.random.default_rng(0).bytes((2 << 20) + 5)
        seen: list[tuple[int, int]] = []
        client.upload_weights("square", data, 3, 2, progress=lambda *counts: seen.append(counts))
        header, *parts = fake.seen[-1].message
        assert header.header == model_service_pb2.UploadHeader(
            model="square", version="3", size_bytes=len(data), sha256=hashlib.sha256(data).digest(),
            architecture_version="2",
        )  # fmt: skip
        assert [len(part.data) for part in parts] == [1 << 20, 1 << 20, 5]
        assert b"".join(part.data for part in parts) == data
        assert seen == [(1 << 20, len(data)), (2 << 20, len(data)), (len(data), len(data))]

    def test_pieces_fit_into_messages(self, connect: Connect, fake: Fake) -> None:
        with connect(fake.target, max_message_bytes=1000) as client:
            client.upload_weights("square", bytes(5000), 3)
        assert max(len(part.data) for part in fake.seen[-1].message[1:]) <= 1000

    def test_a_server_that_refuses_at_once(self, fake: Fake, client: pb.Client) -> None:
        fake.failures = [Failure.of(Reason.VERSION_EXISTS, message="there already")]
        threads = threading.active_count()
        with pytest.raises(FileExistsError, match="there already"):
            client.upload_weights("square", bytes(50 << 20), 3)
        # Whoever fed the stream has gone; gRPC's own threads come and go as they like.
        until = time.monotonic() + 10
        while threading.active_count() > threads + 1 and time.monotonic() < until:
            time.sleep(0.02)
        assert threading.active_count() <= threads + 1

    def test_what_is_no_weights(self, fake: Fake, client: pb.Client, tmp_path: Path) -> None:
        for weights, kind, words in (
            (3, TypeError, "is a int, expected the path"),
            (tmp_path / "nothing", FileNotFoundError, "nothing"),
            (tmp_path, IsADirectoryError, "directory"),
            (io.StringIO("x"), ValueError, "text file"),
            ({3: np.zeros(1)}, TypeError, "key 3"),
            ({"__metadata__": np.zeros(1)}, TypeError, "__metadata__"),
            ({"a": "text"}, TypeError, r"weights\['a'\] is a str"),
            ({"a": None}, TypeError, r"weights\['a'\]"),
            ({"a": np.zeros(1, complex)}, TypeError, r"weights\['a'\] has dtype complex128, which a safetensors file"),
        ):
            with pytest.raises(kind, match=words):
                client.upload_weights("square", weights, 3)  # type: ignore[arg-type]
        assert not fake.seen

    def test_a_pipe_cannot_be_read_twice(self, client: pb.Client) -> None:
        class Pipe(io.BytesIO):
            def seekable(self) -> bool:
                return False

        with pytest.raises(ValueError, match="cannot seek"):
            client.upload_weights("square", Pipe(b"x"), 3)


class TestSafetensors:
    """Mappings become files that the safetensors package reads, with the same names, dtypes, shapes and values."""

    def test_every_dtype(self) -> None:
        values = np.array([[0, 1], [1, 0], [1, 1]])
        arrays = {dtype.name: values.astype(dtype) for dtype in DTYPES.values() if dtype.name != "complex128"}
        table = self.read(arrays)
        assert set(table) == set(arrays)
        for name, (_, shape, data) in table.items():
            assert (shape, data) == ([3, 2], arrays[name].tobytes())

    def test_odd_layouts(self) -> None:
        base = np.arange(24.0).reshape(4, 6)
        arrays = {
            "transposed": base.T, "strided": base[::2, ::-1], "big-endian": base.astype(">f8"), "scalar": np.float32(3),
            "empty": np.zeros((0, 3)), "brain": np.ones(3, ml_dtypes.bfloat16), "0-d": np.array(True),
        }  # fmt: skip
        for name, (_, shape, data) in self.read(arrays).items():
            wanted = np.asarray(arrays[name])
            assert shape == list(wanted.shape)
            assert data == wanted.astype(wanted.dtype.newbyteorder("<")).tobytes()

    def test_large_arrays_are_not_copied(self) -> None:
        big = np.zeros(1 << 20)
        with opened({"big": big}) as source:
            assert np.shares_memory(np.frombuffer(source.buffers[1], np.float64), big)
            assert source.size == sum(map(len, source.buffers))

    def test_the_package_reads_them(self, tmp_path: Path) -> None:
        numpy = pytest.importorskip("safetensors.numpy")
        arrays = {"a.b": np.arange(6.0).reshape(2, 3), "c": np.array(1, np.int8), "d": np.zeros((0, 2), np.float16)}
        with opened(arrays) as source:
            read = numpy.load(b"".join(map(bytes, source.pieces())))
        assert set(read) == set(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(read[name], array)
            assert read[name].dtype == array.dtype and read[name].shape == array.shape

    @staticmethod
    def read(arrays: dict[str, Any]) -> dict[str, tuple[str, list[int], bytes]]:
        with opened(arrays) as source:
            data = b"".join(map(bytes, source.pieces(7)))
            assert source.sha256() == hashlib.sha256(data).digest()
        begin = 8 + int.from_bytes(data[:8], "little")
        assert begin % 8 == 0
        table = json.loads(data[8:begin])
        assert sorted(end for one in table.values() for end in one["data_offsets"])[-1] == len(data) - begin
        return {
            name: (one["dtype"], one["shape"], data[begin + one["data_offsets"][0] : begin + one["data_offsets"][1]])
            for name, one in table.items()
        }


class TestCommand:
    def test_a_bar_only_on_a_terminal(
        self, fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "w"
        file.write_bytes(bytes(3 << 20))
        arguments = ["upload", "square", str(file), "--version", "2", "--target", fake.target]
        assert main(arguments) == 0
        out, err = capsys.readouterr()
        assert out == "square version 2 is ready\n" and err == ""
        monkeypatch.setattr("sys.stderr.isatty", lambda: True)
        assert main(arguments) == 0
        out, err = capsys.readouterr()
        assert out == "square version 2 is ready\n"
        assert "100%" in err and err.endswith("\r\x1b[K") and "\n" not in err

    def test_describe_tells_everything(self, fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
        pb2 = model_service_pb2
        fake.told = {
            "source": "pt2", "revision": 4, "digest": "ab" * 32, "memory_bytes": 3 << 20, "gradient_seconds": 0.0125,
            "limits": ["runs in eval mode alone"],
            "checks": [
                pb2.Check(name="gradient", outcome=pb2.CHECK_OUTCOME_DECLARED, detail="straight-through, on purpose"),
                pb2.Check(name="rows", outcome=pb2.CHECK_OUTCOME_PASSED),
            ],
            "placements": [pb2.Placement(worker="cpu-0", device="cpu", state=pb2.MODEL_STATE_LOADING)],
            "version_statuses": [
                pb2.VersionStatus(version="1", state=pb2.MODEL_STATE_FAILED, reason="torn\nfile"),
                pb2.VersionStatus(version="2", state=pb2.MODEL_STATE_READY, revision=4, digest="ab" * 32),
            ],
        }  # fmt: skip
        assert main(["describe", "square", "--target", fake.target]) == 0
        lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
        for line in (
            "revision 4", "source pt2", f"digest sha256 {'ab' * 32}", "memory 3.0 MiB", "time of a vjp 12.5 ms",
            "placements cpu-0 (cpu), loading", "gradient: declared: straight-through, on purpose", "rows: passed",
            "runs in eval mode alone", "1: failed: torn file", "2: ready",
        ):  # fmt: skip
            assert line in lines
        assert main(["models", "--target", fake.target]) == 0
        assert "square version 1 is failed: torn file" in capsys.readouterr().out.splitlines()
        assert main(["describe", "square", "--json", "--target", fake.target]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["checks"][0]["outcome"] == "declared"
        assert told["placements"] == [{"worker": "cpu-0", "device": "cpu", "state": "loading"}]
        assert told["version_statuses"][0]["reason"] == "torn\nfile"

    def test_load_and_unload(self, fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["load", "square", "--target", fake.target, "--token", "k"]) == 0
        assert main(["unload", "square", "--version", "1", "--target", fake.target]) == 0
        assert capsys.readouterr().out == "square version 2 is ready\nsquare version 1 is unloaded\n"
        assert [seen.message.version for seen in fake.seen] == ["", "1"]
        assert fake.seen[0].metadata["authorization"] == "Bearer k"
