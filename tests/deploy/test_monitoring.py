"""Rules, dashboard and autoscaler speak of metrics that the server declares, and each alert is known to fire."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.deploy.manifests import DEPLOY, needs_kubectl, one
from tests.deploy.promql import family, spoken, wrong

from pullback_server.telemetry import declared
from pullback_wire import Reason

MONITORING = DEPLOY / "monitoring"
GROUPS: list[dict[str, Any]] = yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = [rule for rule in RULES if "alert" in rule]
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
TESTS = sorted((MONITORING / "tests").glob("*.yaml"))

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def queries() -> dict[str, str]:
    """Every query of the dashboard by where it stands."""
    found = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", [])
    }
    return found | {f"mark {mark['name']}": mark["expr"] for mark in DASHBOARD["annotations"]["list"]}


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_promtool
def test_rules_and_scrape_configuration_load() -> None:
    assert f"SUCCESS: {len(RULES)} rules found" in promtool("check", "rules", MONITORING / "rules.yaml")
    assert "SUCCESS" in promtool("check", "config", MONITORING / "prometheus.yml")


@needs_promtool
def test_alerts_fire_when_they_should() -> None:
    assert TESTS
    promtool("test", "rules", *TESTS)


def test_every_alert_is_seen_firing_and_not_firing() -> None:
    seen: dict[str, set[bool]] = {}
    for path in TESTS:
        for case in yaml.safe_load(path.read_text())["tests"]:
            for check in case["alert_rule_test"]:
                severities = {alert["exp_labels"]["severity"] for alert in check["exp_alerts"]}
                seen.setdefault(check["alertname"], set()).add(bool(severities))
                # What a case feeds in and does not expect to fire, is seen not firing.
                fed = {series["series"] for series in case["input_series"]}
                if len(fed) > len(check["exp_alerts"]):
                    seen[check["alertname"]].add(False)
    assert seen == {rule["alert"]: {True, False} for rule in ALERTS}


def test_generated_files_are_those_that_their_sources_make(tmp_path: Path) -> None:
    subprocess.run([sys.executable, MONITORING / "generate.py", tmp_path], check=True, timeout=60)
    for path in tmp_path.iterdir():
        assert path.read_text() == (MONITORING / path.name).read_text(), (
            f"run deploy/monitoring/generate.py: {path.name}"
        )
    assert {path.name for path in tmp_path.iterdir()} == {"dashboard.json", "prometheusrule.yaml"}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert", rule.get("record")))
def test_rules_speak_of_what_there_is(rule: dict[str, Any]) -> None:
    assert wrong(rule["expr"], RECORDED) == []


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_alerts_say_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    notes = rule["annotations"]
    assert notes["summary"]
    assert notes["description"]
    assert notes["runbook"] == f"deploy/runbook.md#{rule['alert'].lower()}"
    assert f"\n## {rule['alert']}\n" in (DEPLOY / "runbook.md").read_text()
    # Only labels that the expression leaves on its result can be shown.
    shown = set(re.findall(r"\$labels\.(\w+)", notes["description"]))
    found = spoken(rule["expr"])
    of_metrics = {label for metric in declared() if metric.name in found.metrics for label in metric.labels}
    assert shown <= found.labels | of_metrics | {"pod", "instance", "namespace"}


def test_the_runbook_speaks_of_no_other_alerts() -> None:
    headings = re.findall(r"^## (Pullback\w+)$", (DEPLOY / "runbook.md").read_text(), re.MULTILINE)
    assert headings == list(dict.fromkeys(rule["alert"] for rule in ALERTS))


def test_faults_of_the_server_are_codes_that_it_can_answer() -> None:
    (codes,) = {code for rule in RULES for code in re.findall(r'code=~"([A-Z_|]+)"', rule["expr"])}
    ours = {"INTERNAL", "UNAVAILABLE", "UNKNOWN"}
    assert set(codes.split("|")) == ours
    assert all(codes in query for query in queries().values() if "code=~" in query)
    # UNKNOWN is what gRPC itself says of a handler that raised.
    assert ours - {"UNKNOWN"} <= {reason.code.name for reason in Reason}
    for fault_of_caller in (Reason.BAD_TENSOR, Reason.QUOTA_EXCEEDED, Reason.PERMISSION_DENIED, Reason.OVERLOADED):
        assert fault_of_caller.code.name not in ours


@pytest.mark.parametrize("where", queries())
def test_the_dashboard_speaks_of_what_there_is(where: str) -> None:
    query = queries()[where]
    assert wrong(query, RECORDED) == []
    assert 'job="pullback"' in query
    assert 'namespace=~"$namespace"' in query
    assert not re.search(r"%[sm]", query)


def test_the_dashboard_shows_every_metric_of_ours() -> None:
    shown = {family(name) for query in queries().values() for name in spoken(query).metrics}
    assert {metric.name for metric in declared() if metric.name.startswith("pullback_")} <= shown


def test_panels_do_not_overlap() -> None:
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


@needs_kubectl
def test_the_autoscaler_asks_for_what_there_is() -> None:
    triggers = one("overlays/autoscaling", "ScaledObject")["spec"]["triggers"]
    asked = {trigger["name"]: trigger["metadata"]["query"] for trigger in triggers}
    assert set(asked) == {"in-flight", "queue-age", "sessions"}
    for query in asked.values():
        assert wrong(query, RECORDED) == []


@needs_kubectl
def test_what_is_applied_is_what_is_tested() -> None:
    assert one("monitoring", "PrometheusRule")["spec"]["groups"] == GROUPS
    assert json.loads(one("monitoring", "ConfigMap")["data"]["dashboard.json"]) == DASHBOARD
