"""What is served under which version, what is kept of uploads, and whose folder is whose."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from safetensors.numpy import save

from pullback_server.faults import Fault
from pullback_server.fleet.seam import LoadFailure, Transient
from pullback_server.hosting.repository import Repository
from pullback_server.job import version_id
from pullback_server.registry import Curator, Registry, StateDir, Table, UploadStore, Version, Versions, VersionState
from pullback_server.registry.threads import to_end, to_end_or_undone
from pullback_wire import Reason

READY, FAILED = VersionState.READY, VersionState.FAILED
WEIGHTS = save({"a": np.zeros(100)})
DIGEST = hashlib.sha256(WEIGHTS).digest()


class Fakes:
    """A fleet and a scheduler that do as they are told. refuse: what the next rehearsals raise, first one first."""

    def __init__(self) -> None:
        self.signatures: dict[str, dict[str, Any]] = {}
        self.refuse: list[Exception] = []
        self.tried: list[tuple[str, str]] = []
        self.used = 0
        self.workers: list[Any] = []

    def hold(self, name: str, *ids: str) -> None:
        kept = {id: SimpleNamespace(name=name, version=id.partition("+")[0], id=id) for id in ids}
        self.signatures = {**self.signatures, name: kept}

    async def rehearse(self, item: Any) -> Any:
        self.tried.append((item.name, item.version))
        if self.refuse:
            raise self.refuse.pop(0)

    async def install(self, item: Any, rehearsed: Any) -> None:
        self.hold(item.name, *self.signatures.get(item.name, {}), item.id)

    async def uninstall(self, model: str, id: str) -> None:
        self.hold(model, *(self.signatures.get(model, {}).keys() - {id}))

    def in_flight(self, model: str, id: str) -> int:
        return self.used

    def forget(self, model: str, id: str) -> None:
        pass


def put(root: Path, number: int, text: str = "x") -> None:
    folder = root / "net" / str(number)
    folder.mkdir(parents=True)
    (folder / "note").write_text(text)
    (root / "net/model.toml").write_text("[source]\nmodule = 'made'\n[versions]\nall = true\n")


class Rig:
    """A registry, and a curator that follows a folder."""

    def __init__(self, folder: Path, mode: Any = "poll") -> None:
        self.root = folder / "repository"
        self.root.mkdir(exist_ok=True)
        self.store = UploadStore(str(folder / "uploads"), 10_000, 100_000)
        self.fakes = Fakes()
        repository = Repository(str(self.root))
        versions = Versions(repository, self.store, lambda name, version: False)
        self.registry = Registry(cast(Any, self.fakes), cast(Any, self.fakes), versions, folder / "state")
        self.table = self.registry.table
        self.curator = Curator(self.registry, repository, self.store, mode, 0.02, 0.02)

    def upload(self, number: int) -> None:
        incoming = self.store.begin(len(WEIGHTS), DIGEST)
        incoming.weights.write_bytes(WEIGHTS)
        self.store.keep(incoming, "net", str(number), "1")

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    def state(self, number: int) -> tuple[VersionState, str] | None:
        found = self.table.find("net", str(number))
        return None if found is None else (found.state, found.reason)


def table(**held: str) -> tuple[Table, Any]:
    fakes = Fakes()
    for name, ids in held.items():
        fakes.hold(name, *ids.split())
    found = Table(lambda: fakes.signatures)
    for name, ids in held.items():
        for id in ids.split():
            found.publish(name, Version(id, READY))
    return found, fakes


def test_what_no_worker_holds_cannot_be_called() -> None:
    found, fakes = table(net="1 2 10")
    changes: list[None] = []
    found.on_change = lambda: changes.append(None)
    assert found.callable("net") == ("1", "2", "10")
    found.refresh()
    changes.clear()
    found.refresh()
    assert not changes
    fakes.hold("net", "1", "2")
    assert found.callable("net") == ("1", "2")
    found.refresh()
    assert len(changes) == 1
    assert found.signature("net", "10") is None
    assert found.counts() == {("net", "ready"): 2, ("net", "failed"): 1}
    fakes.hold("net", "1", "2", "10")
    assert found.callable("net") == ("1", "2", "10")


def test_only_news_is_a_change() -> None:
    found, _ = table(net="1")
    changes: list[None] = []
    found.on_change = lambda: changes.append(None)
    for _ in range(3):
        found.note("net", "2", FAILED, "broken")
        found.note("net", "1", FAILED, "broken as well")
        found.blame({"other": "broken"})
    assert len(changes) == 3
    assert [one.number for one in found.versions("net")] == ["1", "2"]


def test_what_is_noted_outlives_what_is_on_its_way_out() -> None:
    found, _ = table(net="1")
    leaving = found.withdraw("net", "1", "an administrator asked for it")
    assert leaving is not None
    found.note("net", "1", FAILED, "cannot be loaded")
    found.drop("net", leaving)
    kept = found.find("net", "1")
    assert kept is not None and (kept.state, kept.reason) == (FAILED, "cannot be loaded")


def test_what_cannot_be_loaded_for_now_is_tried_again(tmp_path: Path) -> None:
    async def main() -> None:
        rig = Rig(tmp_path)
        put(rig.root, 1)
        put(rig.root, 2)
        rig.fakes.refuse = [Transient("no worker is ready"), LoadFailure("it has no weights")]
        await rig.curator.begin([], strict=False)
        assert rig.state(1) == (FAILED, "no worker is ready")
        await rig.until(lambda: rig.state(1) == (READY, ""))
        assert rig.state(2) == (FAILED, "it has no weights")
        await asyncio.sleep(0.2)
        assert rig.fakes.tried.count(("net", "2")) == 1
        assert version_id("1", 0) in rig.fakes.signatures["net"]
        await rig.curator.close()

    asyncio.run(main())


def test_uploads_that_cannot_be_loaded_any_more_keep_no_server_from_starting(tmp_path: Path) -> None:
    async def main() -> None:
        rig = Rig(tmp_path)
        put(rig.root, 2)
        rig.upload(2)
        rig.upload(3)
        rig.upload(4)
        await rig.curator.begin([], strict=True)
        state = rig.state(2)
        assert state is not None and state[0] is READY and "two models are called 'net' version 2" in state[1]
        state = rig.state(3)
        assert state is not None and state[0] is FAILED and "its architecture: net has no version '1'" in state[1]
        assert str(tmp_path) not in state[1]
        for number in ("2", "3"):
            await rig.curator.unload("net", number, delete=True)
        assert rig.state(3) is None and rig.store.all() == [("net", "4")]
        # What the repository has goes on.
        assert rig.table.callable("net") == ("2",)
        with pytest.raises(Fault) as caught:
            await rig.curator.unload("net", "2")
        assert caught.value.reason is Reason.ADMIN_DISABLED
        await rig.curator.close()
        assert not rig.registry._busy

    asyncio.run(main())


def test_a_version_that_an_upload_has_already_says_so_until_that_is_gone(tmp_path: Path) -> None:
    async def main() -> None:
        rig = Rig(tmp_path)
        rig.fakes.hold("net", "1")
        await rig.curator.begin([], strict=True)
        rig.table.publish("net", Version("1", READY, origin="upload"))
        put(rig.root, 1)
        await rig.until(lambda: "the other from the repository" in (rig.state(1) or ("", ""))[1])
        await rig.curator.unload("net", "1", delete=True)
        await rig.until(lambda: rig.state(1) == (READY, ""))
        found = rig.table.find("net", "1")
        assert found is not None and found.origin == "repository"
        await rig.curator.close()

    asyncio.run(main())


def test_many_uploads_begin_and_end_at_once(tmp_path: Path) -> None:
    store = UploadStore(str(tmp_path), 1000, 64_000)

    def one(_: int) -> None:
        store.begin(1000, bytes(32)).discard()

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(one, range(640)))
    kept = [store.begin(1000, bytes(32)) for _ in range(64)]
    with pytest.raises(Fault) as caught:
        store.begin(1, bytes(32))
    assert caught.value.reason is Reason.STORAGE_FULL
    place = store.keep(kept.pop(), "net", "1", "1")
    for incoming in kept:
        incoming.discard()
    store.begin(1000, bytes(32)).discard()
    store.close()
    again = UploadStore(str(tmp_path), 64_000, 64_000)
    with pytest.raises(Fault, match="uploads hold 1000 bytes"):
        again.begin(63_001, bytes(32))
    again.remove(place)
    again.begin(64_000, bytes(32)).discard()


def test_a_thread_whose_caller_is_cancelled_is_waited_for() -> None:
    async def main() -> None:
        done: list[str] = []
        go = threading.Event()

        def work() -> str:
            go.wait(10)
            done.append("worked")
            return "it"

        for call in (to_end(work), to_end_or_undone(work, lambda made: done.append(f"undid {made}"))):
            go.clear()
            task = asyncio.create_task(call)
            for _ in range(3):
                await asyncio.sleep(0.02)
                task.cancel()
            assert not task.done()
            go.set()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert done == ["worked", "worked", "undid it"]
        assert await to_end(work) == "it"

    asyncio.run(main())


def test_a_load_that_is_cancelled_leaves_no_copy(tmp_path: Path) -> None:
    async def main() -> None:
        rig = Rig(tmp_path, "explicit")
        put(rig.root, 1, "x" * 5_000_000)
        for wait in (0.0, 0.001, 0.003, 0.01):
            task = asyncio.create_task(rig.registry.load("net", "1"))
            await asyncio.sleep(wait)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            held = len(rig.fakes.signatures.get("net", {}))
            assert len([*(tmp_path / "state").glob("*")]) <= held + len(rig.registry._leaving)
        rig.curator.stop()
        with pytest.raises(Transient, match="stopping"):
            await rig.registry.load("net", "1")
        await rig.curator.close()

    asyncio.run(main())


def test_folders_of_servers_that_are_no_more_go(tmp_path: Path) -> None:
    left = tmp_path / "pullback-state-left"
    (left / "1").mkdir(parents=True)
    mine = StateDir(str(tmp_path))
    assert not left.exists()
    with ThreadPoolExecutor(8) as pool:
        others = list(pool.map(lambda _: StateDir(str(tmp_path)), range(16)))
    assert mine.path.exists() and all(one.path.exists() for one in others)
    for one in (mine, *others):
        one.close()
    assert not [*tmp_path.glob("pullback-state-*")]
