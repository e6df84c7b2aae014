"""When a version that has appeared, changed or gone is worth loading or unloading."""

from __future__ import annotations

import time

from pullback_server.hosting.manifest import Manifest, RepositoryError, read_manifest
from pullback_server.hosting.repository import Found, Scan
from pullback_server.hosting.repository_watch import Change, Watch

LATEST = Manifest()
ALL = read_manifest("[versions]\nall = true", "model.toml", "net")


def scan(manifest: Manifest = LATEST, **versions: str) -> Scan:
    """`net` with versions and their fingerprints: scan(v1="a")."""
    return Scan({"net": Found("net", manifest, None, {name[1:]: told for name, told in versions.items()})})


def broken(version: str = "", **versions: str) -> Scan:
    """`net` with a problem of one version, or of all."""
    error = RepositoryError("broken")
    if not version:
        return Scan({"net": Found("net", error=error)})
    (found,) = scan(**versions).models.values()
    return Scan({"net": Found("net", LATEST, None, found.versions, {version: error})})


def add(version: str, fingerprint: str) -> Change:
    return Change("add", "net", version, fingerprint)


def replace(version: str, fingerprint: str) -> Change:
    return Change("replace", "net", version, fingerprint)


def remove(version: str) -> Change:
    return Change("remove", "net", version)


def serving(*scans: Scan) -> Watch:
    watch = Watch()
    for one in scans:
        watch.see(one, 0, at_once=True)
    return watch


def test_a_version_is_told_of_once_it_has_settled() -> None:
    watch = Watch(settle=2)
    assert watch.see(scan(v1="a"), 10) == [] and watch.unsettled
    assert watch.see(scan(v1="a"), 11.9) == []
    assert watch.see(scan(v1="b"), 12) == []
    assert watch.see(scan(v1="b"), 13.9) == [] and watch.unsettled
    assert watch.see(scan(v1="b"), 14) == [add("1", "b")] and not watch.unsettled
    assert watch.see(scan(v1="b"), 99) == []


def test_at_the_start_nothing_is_waited_for() -> None:
    watch = Watch()
    assert watch.see(scan(ALL, v1="a", v2="b"), 0, at_once=True) == [add("1", "a"), add("2", "b")]
    assert watch.see(scan(ALL, v1="a", v2="b"), 0.1) == []


def test_a_change_is_a_replacement() -> None:
    watch = serving(scan(v1="a"))
    assert watch.see(scan(v1="b"), 10) == []
    assert watch.see(scan(v1="b"), 12) == [replace("1", "b")]
    assert watch.see(scan(v1="b"), 14) == []


def test_what_is_gone_for_a_moment_stays() -> None:
    watch = serving(scan(v1="a"))
    assert watch.see(Scan({}), 10) == []
    assert watch.see(scan(v1="a"), 11) == []
    assert watch.see(scan(), 13) == [] and watch.unsettled
    assert watch.see(scan(), 14.9) == []
    assert watch.see(scan(), 15) == [remove("1")]
    assert watch.see(scan(), 20) == [] and not watch.unsettled
    watch.see(scan(v1="a"), 30)
    assert watch.see(scan(v1="a"), 32) == [add("1", "a")]


def test_a_model_that_is_gone() -> None:
    watch = serving(scan(ALL, v1="a", v2="b"))
    watch.see(Scan({}), 10)
    assert watch.see(Scan({}), 12) == [remove("1"), remove("2")]


def test_an_older_version_goes_once_the_newer_was_tried() -> None:
    watch = serving(scan(v1="a"))
    both = scan(v1="a", v2="b")
    assert watch.see(both, 10) == []
    assert watch.see(both, 12) == [add("2", "b")]
    assert watch.see(both, 12.1) == [remove("1")]
    assert watch.see(both, 20) == []


def test_what_cannot_be_loaded_replaces_nothing() -> None:
    watch = serving(scan(v1="a"))
    both = scan(v1="a", v2="b")
    watch.see(both, 10)
    (change,) = watch.see(both, 12)
    watch.failed(change)
    for now in (14, 16, 18):
        assert watch.see(both, now) == []
    fixed = scan(v1="a", v2="c")
    assert watch.see(fixed, 20) == []
    assert watch.see(fixed, 22) == [add("2", "c")]
    assert watch.see(fixed, 24) == [remove("1")]


def test_at_the_start_an_older_version_stands_in() -> None:
    watch = Watch()
    both = scan(v1="a", v2="b")
    (change,) = watch.see(both, 0, at_once=True)
    watch.failed(change)
    assert watch.see(both, 0, at_once=True) == [add("1", "a")]
    assert watch.see(both, 9) == []


def test_a_replacement_that_cannot_be_loaded_leaves_what_was() -> None:
    watch = serving(scan(v1="a"))
    watch.see(scan(v1="b"), 10)
    (change,) = watch.see(scan(v1="b"), 12)
    watch.failed(change)
    assert watch.see(scan(v1="b"), 14) == []
    watch.see(scan(v1="a2"), 16)
    assert watch.see(scan(v1="a2"), 18) == [replace("1", "a2")]


def test_another_try() -> None:
    watch = Watch()
    (change,) = watch.see(scan(v1="a"), 0, at_once=True)
    watch.retry(change)
    assert watch.see(scan(v1="a"), 2) == [change]
    watch.see(scan(), 10)
    (gone,) = watch.see(scan(), 12)
    watch.retry(gone)
    assert watch.see(scan(), 13) == [gone]
    assert watch.see(scan(), 14) == []


def test_what_breaks_while_it_is_served_stays() -> None:
    watch = serving(scan(v1="a"))
    for now in (10, 20, 30):
        assert watch.see(broken(), now) == []
        assert watch.see(broken("1"), now + 5) == []
    assert watch.see(scan(v1="a"), 40) == []


def test_a_broken_version_is_none() -> None:
    watch = serving(scan(v1="a"))
    assert watch.see(broken("2", v1="a"), 10) == []
    assert watch.see(broken("2", v1="a"), 20) == []
    watch.see(scan(v1="a", v2="b"), 30)
    assert watch.see(scan(v1="a", v2="b"), 32) == [add("2", "b")]


def test_another_policy() -> None:
    """The manifest is part of every fingerprint."""
    watch = serving(scan(ALL, v1="a", v2="b"))
    other = scan(LATEST, v1="a2", v2="b2")
    assert watch.see(other, 10) == []
    assert watch.see(other, 12) == [replace("2", "b2")]
    assert watch.see(other, 14) == [remove("1")]


def test_a_renamed_version() -> None:
    watch = serving(scan(v1="a"))
    watch.see(scan(v2="b"), 10)
    assert watch.see(scan(v2="b"), 12) == [add("2", "b")]
    assert watch.see(scan(v2="b"), 14) == [remove("1")]


def test_models_do_not_wait_for_each_other() -> None:
    watch = serving(scan(v1="a"))
    (found,) = scan(v1="a").models.values()
    for now in (10, 11, 12):
        both = Scan(
            {"net": found, "other": Found("other", LATEST, None, {"1": f"{now}"}), "bad": broken().models["net"]}
        )
        assert watch.see(both, now) == []
    assert watch.see(both, 14) == [Change("add", "other", "1", "12")]


def test_what_cannot_be_done_for_now_is_tried_again_after_longer_and_longer() -> None:
    watch = Watch()
    both = scan(v1="a", v2="b")
    (change,) = watch.see(both, 0, at_once=True)
    watch.later(change, 10)
    # An older version stands in meanwhile, and goes when the other has come.
    assert watch.see(both, 10.9) == [add("1", "a")]
    assert watch.see(both, 11) == [change]
    watch.later(change, 11)
    assert watch.see(both, 12.9) == []
    assert watch.see(both, 13) == [change]
    for _ in range(10):
        watch.later(change, 20)
    assert watch.see(both, 79) == []
    # Other contents need not wait.
    other = scan(v1="a", v2="c")
    assert watch.see(other, 79) == []
    assert watch.see(other, 81) == [add("2", "c")]
    assert watch.see(other, 82) == [remove("1")]


def test_many_models_and_versions_take_their_time_once_each() -> None:
    watch = Watch()
    many = Scan({f"m{at}": Found(f"m{at}", ALL, None, {str(one): "a" for one in range(1, 21)}) for at in range(1000)})
    began = time.monotonic()
    assert len(watch.see(many, 0, at_once=True)) == 20_000
    assert watch.see(many, 1) == []
    assert time.monotonic() - began < 3
