"""The conformance suite against a real server, on which all holds, and against ones that are broken in one thing."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests import zoo
from tests.conformance import models as more_models
from tests.conformance.broken import BROKEN, Broken
from tests.conformance.proxy import Body, Fault, Proxy

from pullback.conformance import Finding, NotServing, Verdict, checks, run
from pullback.conformance.__main__ import main
from pullback_server import Server

# The first test makes every check of every model.
pytestmark = pytest.mark.timeout(600)

TOKEN = "a-token-for-the-conformance-suite"
METADATA = (("authorization", f"Bearer {TOKEN}"),)
#: Models of the zoo whose own code fails, and what the suite says of them.
FAILING = {"a_number", "leaves", "no_tensor", "raises"}
#: Checks that no broken server is needed for. gRPC's own client ends a call whose time is up.
BY_GRPC = {"service.deadline"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    principals = tmp_path_factory.mktemp("conformance") / "principals.toml"
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    principals.write_text(f'[[principal]]\nname = "suite"\nsha256 = ["{digest}"]\nrights = ["call", "session"]\n')
    files = [Path(str(module.__file__)) for module in (zoo, more_models)]
    with Server(
        *files,
        threads=1,
        devices="cpu:1",
        principals=str(principals),
        max_message_bytes=8 << 20,
        session_heartbeat_seconds=9.0,
    ) as server:
        yield server


@pytest.fixture(scope="module")
def findings(server: Server) -> list[Finding]:
    return list(run(server.target, metadata=METADATA))


@pytest.fixture(scope="module")
def proxy(server: Server) -> Iterator[Proxy]:
    with Proxy(server.target) as proxy:
        yield proxy


def test_everything_holds(findings: list[Finding]) -> None:
    wrong = [
        f"{finding.check.id} {outcome.model}: expected {outcome.expected}; received {outcome.received}; {outcome.asked}"
        for finding in findings
        for outcome in finding.outcomes
        if outcome.verdict is Verdict.FAIL
    ]
    assert not wrong, "\n".join(wrong)
    # Each check says something of this server: nothing is skipped or absent altogether.
    assert [finding.check.id for finding in findings if finding.verdict is not Verdict.PASS] == []


def test_what_is_skipped_has_its_reason(findings: list[Finding]) -> None:
    found = {finding.check.id: {one.model: one for one in finding.outcomes} for finding in findings}
    for outcomes in found.values():
        for outcome in outcomes.values():
            assert bool(outcome.why) == (outcome.verdict is not Verdict.PASS)
    # Backwards of one's own that are declared are exempt from what they declare, and from nothing else.
    differences = found["vjp.differences"]
    declared = {name for name, one in differences.items() if one.why.startswith("declared as intended")}
    assert declared == {"reversal", "stop_gradient", "straight_through", "swirl"}
    for name in declared:
        for check in ("vjp.linear", "vjp.batched", "jvp.adjoint", "session.grad", "hvp.gradients"):
            assert found[check][name].verdict is Verdict.PASS, (check, name)
    # Elsewhere differences are looked at wherever there is something to differentiate.
    skipped = {name for name, one in differences.items() if one.verdict is Verdict.SKIPPED} - declared
    assert skipped == FAILING | {"words", "half"}  # half: too coarse a dtype for them
    for name in FAILING:
        assert found["errors.model"][name].verdict is Verdict.PASS
    # Second derivatives that cannot be promised were refused.
    for name in ("once", "in_numpy", "hidden", "custom_unprobed"):
        assert found["orders.beyond"][name].verdict is Verdict.PASS
        assert "ORDER_UNAVAILABLE" in found["hvp.differences"][name].why


def test_a_proxy_that_breaks_nothing(proxy: Proxy) -> None:
    proxy.fault = Fault()
    some = ["small", "mixed", "swirl"]
    for finding in run(proxy.target, metadata=METADATA, skip=["session.heartbeat"], models=some):
        assert finding.verdict in (Verdict.PASS, Verdict.SKIPPED), (finding.check.id, finding.outcomes)


@pytest.mark.parametrize("name", ["half", "grainy", "words"])
def test_a_server_of_one_model(server: Server, name: str) -> None:
    some = ["errors.*", "service.concurrency", "parameters.given"]
    for finding in run(server.target, metadata=METADATA, models=[name], only=some):
        assert finding.verdict in (Verdict.PASS, Verdict.SKIPPED), (finding.check.id, finding.outcomes)


def test_a_server_that_does_not_answer_is_not_asked_again_and_again(proxy: Proxy) -> None:
    asked: list[str] = []

    def hang(name: str, data: bytes) -> None:
        if name == "Evaluate":
            asked.append(name)
            time.sleep(3)

    proxy.fault = Fault(bytes_=hang)
    try:
        (finding,) = run(proxy.target, metadata=METADATA, models=["cube"], only=["errors.model"], timeout=1.0)
    finally:
        proxy.fault = Fault()
    assert len(asked) == 1
    assert finding.verdict is Verdict.FAIL and "DEADLINE_EXCEEDED" in finding.outcomes[0].received


def test_a_status_that_there_is_not(proxy: Proxy) -> None:
    def strange(body: Body) -> None:
        if body.message.status.code:
            body.message.status.code = 99

    proxy.fault = Fault(answer=strange)
    try:
        (finding,) = run(proxy.target, metadata=METADATA, models=["small"], only=["session.errors"])
    finally:
        proxy.fault = Fault()
    assert (finding.outcomes[0].verdict, finding.outcomes[0].received) == (Verdict.FAIL, "99")


def test_ctrl_c_tells_what_there_is(server: Server) -> None:
    line = [sys.executable, "-m", "pullback.conformance", server.target, "--model", "small"]
    environment = {**os.environ, "PULLBACK_TOKEN": TOKEN}
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("pass ")
        process.send_signal(signal.SIGINT)
        said, wrong = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in wrong
    assert said.endswith(", and then Ctrl-C\n")


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_a_broken_server_is_found_out(proxy: Proxy, broken: Broken) -> None:
    proxy.fault = broken.fault()
    try:
        (finding,) = run(
            proxy.target, metadata=METADATA, only=[broken.check], models=broken.models, timeout=6.0, patience=5.0
        )
    finally:
        proxy.fault = Fault()
    failed = [outcome for outcome in finding.outcomes if outcome.verdict is Verdict.FAIL]
    assert failed, finding
    for outcome in failed:
        assert outcome.expected and outcome.received and outcome.asked


def test_each_check_can_fail() -> None:
    assert {check.id for check in checks()} == {broken.check for broken in BROKEN} | BY_GRPC


def test_the_command(server: Server, proxy: Proxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = [server.target, "--model", "sm*", "--only", "vjp.*", "--skip", "vjp.c*"]
    assert main([*some, "--token", TOKEN]) == 0
    said = capsys.readouterr().out
    assert "pass    vjp.differences            1 model\n" in said and "vjp.complex" not in said
    assert "skipped vjp.scalar                 0 models, 1 skipped, its output is not one real scalar\n" in said
    assert said.endswith("8 checks: 5 pass, 3 skipped\n"), said
    # What fails is told with the promise, the request, what was expected and what came.
    proxy.fault = next(broken for broken in BROKEN if broken.name == "the sign of a VJP is wrong").fault()
    try:
        wrong = [proxy.target, "--model", "small", "--only", "vjp.differences", "--token", TOKEN]
        assert main(wrong) == 1
        said = capsys.readouterr().out
        assert main([*wrong, "--json"]) == 1
    finally:
        proxy.fault = Fault()
    for part in (
        "fail    vjp.differences",
        "J^H v",
        "model     small",
        "request   Evaluate of 'small'",
        "expected",
        "1 fail",
    ):
        assert part in said, said
    told = json.loads(capsys.readouterr().out)
    assert told["summary"] == {"pass": 0, "fail": 1, "skipped": 0, "absent": 0}
    (check,) = told["checks"]
    assert check["outcomes"][0]["model"] == "small" and check["outcomes"][0]["expected"]
    # Inputs of one's own.
    np.savez(tmp_path / "x.npz", x=np.ones((2, 5)))
    given = [server.target, "--token", TOKEN, "--model", "cube", "--only", "jacobian.rows", "--inputs"]
    assert main([*given, f"cube={tmp_path / 'x.npz'}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"]["pass"] == 1
    assert main([*given, f"cube={tmp_path / 'nowhere.npz'}"]) == 2
    assert main([*given, "cube"]) == 2
    # Nobody there, nobody let in, and a token in plain text.
    assert main(["127.0.0.1:1"]) == 2
    assert main([server.target, "--token", "wrong"]) == 2
    assert main(["gradients.example:8470", "--token", TOKEN]) == 2
    assert "--tls" in capsys.readouterr().err
    assert main([server.target, "--token", "s\u00e9cret"]) == 2
    assert capsys.readouterr().err.endswith(": the token has characters other than printable ASCII\n")
    # Nothing wrong was found, but nothing was looked at.
    assert main([*some, "--token", TOKEN, "--model", "smoll"]) == 2
    assert "hosts no model 'smoll'; it has " in capsys.readouterr().err
    assert main([server.target, "--token", TOKEN, "--model", "raises", "--only", "vjp.*"]) == 2
    assert "no check of a model could be made" in capsys.readouterr().err
    with pytest.raises(NotServing):
        next(run("127.0.0.1:1"))


def test_the_list_needs_no_server() -> None:
    listing = subprocess.run(
        [sys.executable, "-m", "pullback.conformance", "--list"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(listing) == len(checks()) > 90
    for check, line in zip(checks(), listing, strict=True):
        assert line.split(maxsplit=1) == [check.id, check.says]
        assert check.says.endswith(".") and len(check.says) > 20


def test_torch_is_not_needed() -> None:
    code = (
        "import sys; from pullback.conformance import checks; checks(); "
        "print([name for name in ('torch', 'jax', 'scipy', 'pullback_server') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
