"""A model repository: what is found in it, what is refused, what is copied of it, and when."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from safetensors.numpy import save_file

from pullback_server.hosting.repository import Found, NotSettled, Repository, RepositoryError, Scan, Unavailable
from pullback_server.hosting.repository_watch import Change, Watch


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "repo"
    made.mkdir()
    return made


def write(root: Path, path: str, content: str | bytes = "") -> Path:
    to = root / path
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(content.encode() if isinstance(content, str) else content)
    return to


def net(root: Path, *versions: str, toml: str = "") -> None:
    write(root, "net/model.toml", toml)
    for version in versions:
        write(root, f"net/{version}/model.py", f"# {version}")


def only(root: Path) -> Found:
    (found,) = Repository(str(root)).scan().models.values()
    return found


def staged(root: Path, version: str = "1") -> Path:
    return Repository(str(root)).stage("net", version, root.parent / "staged").directory


def refused(root: Path, version: str = "1", error: type[RepositoryError] = RepositoryError) -> str:
    """What staging says, after nothing was left behind."""
    with pytest.raises(error) as caught:
        staged(root, version)
    assert type(caught.value) is error
    assert not (root.parent / "staged").exists()
    return str(caught.value)


def names(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


# --- the root


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_a_root_that_is_no_directory(tmp_path: Path, kind: str) -> None:
    at = tmp_path / "repo"
    if kind == "file":
        at.touch()
    repository = Repository(str(at))
    expected = "no such directory" if kind == "missing" else "not a directory"
    for ask in (repository.check, repository.scan):
        with pytest.raises(RepositoryError, match=f"{at}: the model repository cannot be read: {expected}"):
            ask()


def test_a_missing_root_in_a_store() -> None:
    repository = Repository(f"memory://{uuid.uuid4()}")
    for ask in (repository.check, repository.scan):
        with pytest.raises(
            RepositoryError, match=r"memory://.*: the model repository cannot be read: no such directory"
        ):
            ask()


def test_an_empty_root_is_a_repository(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    repository = Repository(str(root))
    with caplog.at_level(logging.WARNING):
        repository.check()
    assert "the model repository is empty" in caplog.text
    assert repository.scan() == Scan({})


def test_a_url_that_nothing_can_read() -> None:
    with pytest.raises(RepositoryError, match="nope://bucket/models: no model repository: Protocol not known"):
        Repository("nope://bucket/models")


def test_a_password_is_not_shown() -> None:
    with pytest.raises(RepositoryError) as caught:
        Repository("nope://me:secret@host/models")
    assert "secret" not in str(caught.value).partition("no model repository")[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(root: Path) -> None:
    net(root, "1", "2")
    (root / "net/1/model.py").chmod(0)
    found = only(root)
    assert list(found.versions) == ["2"] and "Permission denied" in str(found.problems["1"])
    root.chmod(0)
    try:
        with pytest.raises(RepositoryError, match="cannot be read: PermissionError"):
            Repository(str(root)).check()
    finally:
        root.chmod(0o700)


# --- what is found


def test_models_and_versions(root: Path) -> None:
    net(root, "1", "20260101", toml='description = "A"')
    write(root, "other/model.toml", "[source]\nmodule = 'nets'")
    (root / "other/7").mkdir()
    write(root, "README.md")
    write(root, ".git/model.toml")
    scan = Repository(str(root)).scan()
    assert list(scan.models) == ["net", "other"] and not scan.problems()
    first, second = scan.models.values()
    assert first.manifest is not None and first.manifest.description == "A"
    assert sorted(first.versions) == ["1", "20260101"] and list(second.versions) == ["7"]


def test_one_models_fault_hides_no_other(root: Path) -> None:
    net(root, "1")
    write(root, "broken/model.toml", "a = ")
    write(root, "no_manifest/1/model.py")
    write(root, "renamed/model.toml", "name = 'net'")
    write(root, "latin/model.toml", b"description = '\xe9'")
    write(root, "bad name/model.toml")
    (root / "loop").symlink_to("loop")
    problems = {name: str(error) for (name, _), error in Repository(str(root)).scan().problems().items()}
    assert sorted(problems) == ["bad name", "broken", "latin", "no_manifest", "renamed"]
    assert f"{root}/bad name: model name 'bad name': expected letters" in problems["bad name"]
    assert problems["broken"].startswith(f"{root}/broken/model.toml: not TOML: ")
    assert problems["latin"] == f"{root}/latin/model.toml: byte 15 is not UTF-8"
    assert problems["no_manifest"].startswith(f"{root}/no_manifest/model.toml is missing")
    assert "name is 'net', expected 'renamed' as its directory is called" in problems["renamed"]
    assert list(Repository(str(root)).scan().models["net"].versions) == ["1"]


@pytest.mark.parametrize("name", ["007", "0", "1.5", "v2", "9" * 19])
def test_directories_that_were_meant_as_versions(root: Path, name: str) -> None:
    net(root, "1", name)
    found = only(root)
    assert list(found.versions) == ["1"]
    assert str(found.problems[name]).startswith(f"{root}/net/{name}: expected a version to be a positive number")
    assert names(staged(root)) == ["model.py", "model.toml"]


def test_a_model_without_versions(root: Path) -> None:
    net(root)
    write(root, "net/lib/a.py")
    assert f"{root}/net has no version, expected one in a directory such as {root}/net/1" in str(
        only(root).problems[""]
    )
    assert "has no version '1'; there are: none" in refused(root, error=NotSettled)


def test_an_empty_version(root: Path) -> None:
    net(root)
    (root / "net/1").mkdir()
    text = f"{root}/net/1: model.py is missing (source.file), expected here or beside model.toml"
    assert str(only(root).problems["1"]) == text == refused(root)
    write(root, "net/model.py")
    assert list(only(root).versions) == ["1"]


def test_named_weights_that_are_missing(root: Path) -> None:
    net(root, "1", toml="[source]\nweights = 'a/w.safetensors'")
    assert "net/1: a/w.safetensors is missing (source.weights)" in str(only(root).problems["1"])


def test_a_manifest_of_one_version_is_refused(root: Path) -> None:
    net(root, "1")
    write(root, "net/1/model.toml")
    assert "net/1/model.toml: expected none here" in refused(root)


def test_a_file_where_others_have_a_directory(root: Path) -> None:
    net(root, "1")
    write(root, "net/lib/a.py")
    write(root, "net/1/lib")
    assert "net/1: lib is both a file and a directory" in refused(root)


IGNORED = [".hidden", "a.tmp", "b.part", "c.partial", "d~", "__pycache__/x.pyc", ".git/config", "e.tmp/f"]


def test_ignored_names_change_nothing(root: Path) -> None:
    net(root, "1")
    before = only(root)
    for name in IGNORED:
        write(root, f"net/{name}")
        write(root, f"net/1/{name}")
    write(root, "net/2.tmp/model.py")
    write(root, ".net/model.toml")
    write(root, "net.tmp/model.toml")
    assert only(root).versions == before.versions and not only(root).problems
    assert names(staged(root)) == ["model.py", "model.toml"]


def test_fingerprints(root: Path) -> None:
    net(root, "1", "2")
    write(root, "net/lib/a.py", "1")
    write(root, "other/model.toml")
    seen = [Repository(str(root)).scan().models["net"].versions]

    def changed() -> set[str]:
        seen.append(Repository(str(root)).scan().models["net"].versions)
        return {version for version in seen[-1] if seen[-1][version] != seen[-2].get(version)}

    assert changed() == set()
    write(root, "other/1/model.py")
    assert changed() == set()
    write(root, "net/1/new.py")
    assert changed() == {"1"}
    write(root, "net/2/model.py", "longer than it was")
    assert changed() == {"2"}
    time.sleep(0.02)
    path = write(root, "net/2/model.py", "lONGER than it was")
    assert changed() == {"2"}
    (root / "net/1/new.py").unlink()
    assert changed() == {"1"}
    write(root, "net/lib/a.py", "12")
    assert changed() == {"1", "2"}
    write(root, "net/model.toml", "batch_axis = 0")
    assert changed() == {"1", "2"}
    kept = path.stat()
    time.sleep(0.02)
    path.write_text("LONGER than it was")
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert changed() == {"2"}


def test_a_manifest_is_read_again_when_it_changes(root: Path) -> None:
    net(root, "1", toml="batch_axis = 0")
    repository = Repository(str(root))
    for axis in ("1", "x", "22"):
        assert str(repository.scan().models["net"].error) == str(repository.look("net").error)
        write(root, "net/model.toml", f"batch_axis = {axis}")
        found = repository.scan().models["net"]
        if axis == "x":
            assert "not TOML" in str(found.error)
        else:
            assert found.manifest is not None and found.manifest.batch_axis == int(axis)


# --- links


def test_links_within_the_root_are_followed(root: Path) -> None:
    write(root, ".data/v7/model.py", "# 7")
    write(root, ".data/model.toml")
    (root / "net").mkdir()
    (root / "net/model.toml").symlink_to("../.data/model.toml")
    (root / "net/1").symlink_to(root / ".data/v7")
    linked = root.parent / "linked"
    linked.symlink_to(root)
    assert list(only(linked).versions) == ["1"]
    assert (staged(root) / "model.py").read_text() == "# 7"
    assert not (root.parent / "staged/model.toml").is_symlink()


@pytest.mark.parametrize(
    ("link", "to", "where"),
    [
        ("net/1/w.py", "../../../outside/a.py", "1"),
        ("net/1/lib", "../../../outside", "1"),
        ("net/3", "../../outside", "3"),
        ("net/shared.py", "/etc/passwd", ""),
        ("leads", "../outside", "leads"),
    ],
)
def test_links_out_of_the_root_are_refused(root: Path, link: str, to: str, where: str) -> None:
    net(root, "1", "2")
    write(root.parent, "outside/a.py")
    (root / link).symlink_to(to)
    scan = Repository(str(root)).scan()
    ((name, version), problem), *others = scan.problems().items()
    assert not others and (version == where if name == "net" else name == where)
    assert f"{root}/{link} is a symbolic link to " in str(problem)
    assert "which is outside of the repository" in str(problem)
    assert where == "" or "2" in scan.models["net"].versions


def test_other_things_that_are_no_files(root: Path) -> None:
    net(root, "1", "2", "3", "4")
    (root / "net/1/up").symlink_to("..")
    (root / "net/2/gone").symlink_to("nothing")
    os.mkfifo(root / "net/3/pipe")
    (root / "net/4/self").symlink_to("self")
    found = only(root)
    assert f"{root}/net/1/up is a symbolic link to {root}/net, which it is in" == str(found.problems["1"])
    assert f"{root}/net/2/gone is a symbolic link to {root}/net/2/nothing, which is not there" == str(
        found.problems["2"]
    )
    assert f"{root}/net/3/pipe is neither a file nor a directory" == str(found.problems["3"])
    assert "4" in found.problems and not found.versions


def test_names_that_no_file_may_have(root: Path) -> None:
    net(root, "1", "2")
    for name in (b"a\nb.py", b"a\\b.py", b"\xff.py"):
        (root / "net/1" / os.fsdecode(name)).touch()
    found = only(root)
    assert list(found.versions) == ["2"] and "is refused: expected a " in str(found.problems["1"])


# --- staging


@pytest.mark.parametrize("scheme", ["", "file://", "memory://"])
def test_staging(root: Path, tmp_path: Path, scheme: str) -> None:
    files: dict[str, bytes] = {
        "model.toml": b"batch_axis = 0",
        "model.py": b"shared",
        "lib/__init__.py": b"",
        "lib/a.py": b"a",
        "1/model.py": b"own",
        "1/lib/a.py": b"A" * 5_000_000,
        "2/model.py": b"not this",
    }
    url = f"{scheme}{root}" if scheme != "memory://" else f"memory://{uuid.uuid4()}/models"
    for path, content in files.items():
        with fsspec.open(f"{url}/net/{path}", "wb", auto_mkdir=True) as file:
            file.write(content)
    if scheme != "memory://":
        (root / "net/1/empty").mkdir()
    repository = Repository(url)
    repository.check()
    assert sorted(repository.scan().models["net"].versions) == ["1", "2"]
    found = repository.stage("net", "1", tmp_path / "deep/staged")
    assert found.directory == tmp_path / "deep/staged"
    expected = {**files, "model.py": b"own", "lib/a.py": files["1/lib/a.py"]}
    wanted = ["lib/__init__.py", "lib/a.py", "model.py", "model.toml"]
    assert names(found.directory) == wanted
    for name in wanted:
        assert (found.directory / name).read_bytes() == expected[name]
    lines = sorted(f"{hashlib.sha256(expected[name]).hexdigest()}  {name}\n" for name in wanted)
    assert found.digest == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert found.fingerprint == repository.scan().models["net"].versions["1"]
    assert found.bytes == sum(len(expected[name]) for name in wanted)
    assert found.manifest.batch_axis == 0
    with pytest.raises(FileExistsError):
        repository.stage("net", "1", tmp_path / "deep/staged")
    assert names(found.directory) == wanted


def test_a_copy_is_no_link(root: Path) -> None:
    net(root, "1")
    copy = staged(root) / "model.py"
    with (root / "net/1/model.py").open("r+") as file:
        file.write("changed in place")
    assert copy.read_text() == "# 1" and copy.stat().st_nlink == 1


def test_what_is_not_there(root: Path) -> None:
    net(root, "1", "3")
    assert refused(root, "2", NotSettled) == f"{root}/net has no version '2'; there are: 1, 3"
    repository = Repository(str(root))
    for name, expected in [
        ("nett", "has no model 'nett'"),
        ("../repo/net", "expected letters"),
        ("", "expected letters"),
    ]:
        with pytest.raises(RepositoryError, match=expected):
            repository.look(name)
        with pytest.raises(RepositoryError, match=expected):
            repository.stage(name, "1", root / "x")


def test_a_full_disk(root: Path) -> None:
    net(root, "1")
    write(root, "net/1/big", b"0" * 1_000_000)
    code = (
        "import resource, sys, signal\nfrom pathlib import Path\n"
        "from pullback_server.hosting.repository import Repository, RepositoryError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        # A disk that takes no more, as far as this process can tell.
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n"
        "try: Repository(sys.argv[1]).stage('net', '1', Path(sys.argv[2]))\n"
        "except RepositoryError as error: print(type(error).__name__, error)\n"
    )
    into = root.parent / "staged"
    command = [sys.executable, "-c", code, str(root), str(into)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.startswith(f"Unavailable {root}/net/1 cannot be copied to {into}: ") and "too large" in out
    assert not into.exists()


def test_a_copy_that_is_stopped(root: Path) -> None:
    net(root, "1")
    repository = Repository(str(root))
    repository.stop()
    with pytest.raises(Unavailable, match="stopping"):
        repository.stage("net", "1", root.parent / "staged")
    assert not (root.parent / "staged").exists()


def test_a_manifest_that_is_far_too_long(root: Path) -> None:
    net(root, "1")
    write(root, "net/model.toml", b"#" * (1 << 20) + b"\n")
    assert str(Repository(str(root)).scan().models["net"].error).endswith(
        "has more than 1048576 bytes, expected a manifest"
    )


def test_what_callers_are_shown(root: Path) -> None:
    assert Repository(str(root)).shown(f"{root}/net/1 is not in {root}") == "net/1 is not in the repository"


def test_nowhere_to_stage_to(root: Path) -> None:
    net(root, "1")
    write(root.parent, "file")
    with pytest.raises(RepositoryError, match=r"net/1 cannot be copied to .*Not a directory"):
        Repository(str(root)).stage("net", "1", root.parent / "file/staged")


# --- half-copied


def sums(root: Path, version: str = "1") -> None:
    lines = [
        f"{hashlib.sha256((root / 'net' / version / name).read_bytes()).hexdigest()}  {name}"
        for name in names(root / "net" / version)
    ]
    write(root, f"net/{version}/SHA256SUMS", "\n".join(lines) + "\n")


def test_sha256sums_as_sha256sum_writes_them(root: Path) -> None:
    net(root, "1", "2", "3")
    for version, command in (
        ("1", "sha256sum * > SHA256SUMS"),
        ("2", "find . -type f -exec sha256sum {} + > SHA256SUMS"),
        ("3", "find . -type f | xargs sha256sum -b > SHA256SUMS"),
    ):
        write(root, f"net/{version}/lib/a.py")
        write(root, f"net/{version}/.hidden", "x")
        if version == "1":
            (root / "net/1/lib/a.py").unlink()
            (root / "net/1/lib").rmdir()
        subprocess.run(command, shell=True, cwd=root / "net" / version, check=True)
        found = Repository(str(root)).stage("net", version, root.parent / version)
        assert "SHA256SUMS" not in names(found.directory)


def test_sha256sums_that_do_not_match(root: Path) -> None:
    net(root, "1")
    write(root, "net/shared.py", "not listed, and need not be")
    write(root, "net/1/weights", "w" * 100)
    sums(root)
    staged(root)
    for path in (root.parent / "staged").rglob("*"):
        path.unlink()
    (root.parent / "staged").rmdir()

    write(root, "net/1/weights", "w" * 50)
    text = refused(root, error=NotSettled)
    assert text == f"{root}/net/1/weights differs from SHA256SUMS: it is still being copied, or damaged"
    (root / "net/1/weights").unlink()
    assert f"{root}/net/1/weights is missing, but SHA256SUMS lists it" in refused(root, error=NotSettled)
    write(root, "net/1/weights", "w" * 100)
    write(root, "net/1/more", "x")
    assert f"{root}/net/1/more is not listed in SHA256SUMS" in refused(root, error=NotSettled)


@pytest.mark.parametrize(
    "line", ["abc  model.py", "0" * 64 + " model.py", "0" * 64 + "  ../x", "0" * 64 + "  /etc/passwd"]
)
def test_sha256sums_that_are_none(root: Path, line: str) -> None:
    net(root, "1")
    write(root, "net/1/SHA256SUMS", f"\n{line}\n")
    assert f"{root}/net/1/SHA256SUMS: line 2 " in refused(root, error=NotSettled)


def weights(root: Path) -> Path:
    path = root / "net/1/weights.safetensors"
    save_file({"a": np.ones((100, 10), np.float32), "b": np.zeros(3)}, path)
    return path


def test_whole_safetensors(root: Path) -> None:
    net(root, "1")
    weights(root)
    save_file({}, root / "net/empty.safetensors")
    assert "weights.safetensors" in names(staged(root))


@pytest.mark.parametrize("length", [0, 4, 8, 60, 1000, -1])
def test_truncated_safetensors(root: Path, length: int) -> None:
    net(root, "1")
    path = weights(root)
    whole = path.read_bytes()
    path.write_bytes(whole[:length])
    text = refused(root)
    assert text.startswith(f"{root}/net/1/weights.safetensors is truncated")
    assert f"has {len(whole[:length])} bytes, " in text
    if length in (1000, -1):
        assert text.endswith(f"its header says {len(whole)}")


@pytest.mark.parametrize(
    "content",
    [b"PK\3\4" + b"0" * 100, b"\2" + b"\0" * 7 + b"[]", b"\2" + b"\0" * 7 + b"{}extra", b"\3" + b"\0" * 7 + b"nil"],
)
def test_what_is_no_safetensors_file(root: Path, content: bytes) -> None:
    net(root, "1")
    write(root, "net/1/weights.safetensors", content)
    assert "no safetensors file: " in refused(root)


@pytest.fixture
def busy(root: Path) -> Iterator[threading.Event]:
    """Writes into one version without end, until the event is set."""
    stop = threading.Event()
    net(root, "1")
    big = write(root, "net/1/big", b"0" * 20_000_000)

    def work() -> None:
        with big.open("r+b") as file:
            while not stop.wait(0.002):
                file.seek(0)
                file.write(os.urandom(100))
                file.flush()

    thread = threading.Thread(target=work)
    thread.start()
    yield stop
    stop.set()
    thread.join()


def test_what_is_written_to_while_it_is_copied(root: Path, busy: threading.Event) -> None:
    told = []
    for attempt in range(50):
        # On a busy machine the writer may stand still for as long as a copy takes.
        try:
            Repository(str(root)).stage("net", "1", root.parent / f"attempt{attempt}")
        except NotSettled as error:
            told.append(str(error))
            assert not (root.parent / f"attempt{attempt}").exists()
        if len(told) == 5:
            break
    assert len(told) == 5
    assert all(text.startswith(f"{root}/net/1 is being changed") for text in told)
    busy.set()
    time.sleep(0.05)
    copied = (staged(root) / "big").read_bytes()
    assert copied == (root / "net/1/big").read_bytes()


def test_a_version_that_grows_is_never_staged_before_it_is_whole(root: Path, tmp_path: Path) -> None:
    """Once it has stood still for a while, and not before; with pauses between its files that are shorter."""
    write(root, "net/model.toml")
    whole = {f"part{index}": os.urandom(200_000) for index in range(6)} | {"model.py": b"#"}

    def publish() -> None:
        for name, content in whole.items():
            (root / "net/1").mkdir(exist_ok=True)
            with (root / "net/1" / name).open("wb") as file:
                for start in range(0, len(content), 50_000):
                    file.write(content[start : start + 50_000])
                    file.flush()
                    time.sleep(0.01)

    writer = threading.Thread(target=publish)
    writer.start()
    repository, watch, attempts = Repository(str(root)), Watch(settle=0.5), 0
    while True:
        for change in watch.see(repository.scan(), time.monotonic()):
            attempts += 1
            found = repository.stage("net", "1", tmp_path / str(attempts))
            writer.join()
            assert change == Change("add", "net", "1", found.fingerprint)
            assert {name: (found.directory / name).read_bytes() for name in whole} == whole
            return
        time.sleep(0.005)


def test_sha256sums_written_last_guard_a_slow_copy(root: Path, tmp_path: Path) -> None:
    """Without waiting at all: nothing is staged that is not what was listed."""
    write(root, "net/model.toml")
    whole = {f"part{index}": os.urandom(100_000) for index in range(5)} | {"model.py": b"#"}
    listed = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in whole.items())
    write(root, "net/1/SHA256SUMS", listed)

    def publish() -> None:
        for name, content in whole.items():
            for end in range(0, len(content), 30_000):
                (root / "net/1" / name).write_bytes(content[:end])
                time.sleep(0.01)
            (root / "net/1" / name).write_bytes(content)

    writer = threading.Thread(target=publish)
    writer.start()
    repository, refusals = Repository(str(root)), 0
    while True:
        try:
            found = repository.stage("net", "1", tmp_path / "staged")
            break
        except RepositoryError:
            refusals += 1
    assert {name: (found.directory / name).read_bytes() for name in whole} == whole
    writer.join()
    assert refusals


# --- stores


def test_keys_that_lead_out_of_a_store(tmp_path: Path) -> None:
    store, top = fsspec.filesystem("memory"), f"/{uuid.uuid4()}"
    for path in (
        "net/model.toml",
        "net/1/model.py",
        "net/2/model.py",
        "net/2/../../../evil",
        "bad/model.toml",
        "bad/a//b",
    ):
        store.pipe(f"{top}/{path}", b"")
    scan = Repository(f"memory:/{top}").scan()
    assert list(scan.models["net"].versions) == ["1"]
    assert "2/../../../evil is refused: expected a relative path without '..'" in str(scan.models["net"].problems["2"])
    assert "bad/a//b is refused" in str(scan.models["bad"].error)


def test_a_store_tells_of_changes() -> None:
    store, top = fsspec.filesystem("memory"), f"/{uuid.uuid4()}"
    store.pipe({f"{top}/net/model.toml": b"", f"{top}/net/1/model.py": b"a", f"{top}/net/2/model.py": b"a"})
    repository = Repository(f"memory:/{top}")
    before = repository.scan().models["net"].versions
    assert repository.scan().models["net"].versions == before
    store.pipe(f"{top}/net/2/model.py", b"b")
    after = repository.scan().models["net"].versions
    assert after["1"] == before["1"] and after["2"] != before["2"]
    assert repository.look("net") == repository.scan().models["net"]
    store.rm(top, recursive=True)
    with pytest.raises(RepositoryError):
        repository.scan()
