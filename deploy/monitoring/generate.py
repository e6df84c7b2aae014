"""Writes what is generated in this folder: prometheusrule.yaml from rules.yaml, dashboard.json from dashboard.py.

python deploy/monitoring/generate.py [FOLDER]: into FOLDER instead, for comparison.
"""

import json
import sys
from pathlib import Path

import dashboard
import yaml

HERE = Path(__file__).parent

_HEAD = """\
# Written by generate.py from rules.yaml; change that.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: pullback
  labels:
    app.kubernetes.io/name: pullback
spec:
"""


def prometheus_rule() -> str:
    """The rules, word for word, as the spec of a PrometheusRule."""
    lines = (HERE / "rules.yaml").read_text().splitlines()
    rules = "\n".join(f"  {line}" if line else "" for line in lines if not line.startswith("#"))
    text = f"{_HEAD}{rules}\n"
    assert yaml.safe_load(text)["spec"] == yaml.safe_load((HERE / "rules.yaml").read_text())
    return text


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    (folder / "prometheusrule.yaml").write_text(prometheus_rule())
    (folder / "dashboard.json").write_text(json.dumps(dashboard.dashboard(), indent=2) + "\n")


if __name__ == "__main__":
    main()
