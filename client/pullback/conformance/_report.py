"""What was found, for people and for programs."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from pullback.conformance._check import Check, Finding, Outcome, Verdict

_WIDTH = 27
_INTENDED = "declared as intended"


def line(finding: Finding, reasons: bool = False) -> str:
    """A check in one line, and below it what failed and what is exempt. reasons: of every skip too."""
    found = [f"{finding.verdict.value:<8}{finding.check.id:<{_WIDTH}}{_counts(finding)}".rstrip()]
    for outcome in finding.outcomes:
        if outcome.verdict is Verdict.FAIL:
            found += _failure(finding.check, outcome)
    whys = _whys(finding)
    for why, names in whys.items() if len(whys) > 1 or _made(finding) else ():
        if reasons or why.startswith(_INTENDED):
            told = why if reasons else textwrap.shorten(why, 90, placeholder=" ...")
            found.append(_indented(f"{', '.join(names)}: {told}"))
    return "\n".join(found)


def _counts(finding: Finding) -> str:
    if not finding.check.for_each_model:
        return finding.outcomes[0].why
    counts = Counter(outcome.verdict for outcome in finding.outcomes)
    said = [f"{counts[Verdict.PASS]} models"] if counts[Verdict.PASS] != 1 else ["1 model"]
    said += [f"{counts[verdict]} {verdict.value}" for verdict in list(Verdict)[1:] if counts[verdict]]
    whys = _whys(finding)
    if not _made(finding) and len(whys) == 1:
        said.append(textwrap.shorten(next(iter(whys)), 90, placeholder=" ..."))
    return ", ".join(said)


def _made(finding: Finding) -> bool:
    """Whether it held or failed anywhere."""
    return finding.verdict in (Verdict.PASS, Verdict.FAIL)


def _whys(finding: Finding) -> dict[str, list[str]]:
    """Names of models by why they were skipped."""
    found: dict[str, list[str]] = {}
    for outcome in finding.outcomes:
        if outcome.why and outcome.model:
            found.setdefault(outcome.why, []).append(outcome.model)
    return found


def _failure(check: Check, outcome: Outcome) -> Iterable[str]:
    yield _indented(f"The contract: {check.says}")
    if outcome.model:
        yield _indented(f"model     {outcome.model}")
    if outcome.asked:
        yield _indented(f"request   {outcome.asked}")
    yield _indented(f"expected  {outcome.expected}")
    yield _indented(f"received  {outcome.received}")


def _indented(text: str) -> str:
    return textwrap.fill(text, 118, initial_indent=" " * 8, subsequent_indent=" " * 18, break_on_hyphens=False)


def summary(findings: Sequence[Finding]) -> str:
    """The last line."""
    counts = Counter(finding.verdict for finding in findings)
    told = ", ".join(f"{counts[verdict]} {verdict.value}" for verdict in Verdict if counts[verdict])
    return f"{len(findings)} checks: {told or 'none'}"


def as_json(target: str, findings: Sequence[Finding]) -> dict[str, Any]:
    """All of it, for programs."""
    counts = Counter(finding.verdict for finding in findings)
    return {
        "target": target,
        "summary": {verdict.value: counts[verdict] for verdict in Verdict},
        "checks": [
            {
                "id": finding.check.id,
                "says": finding.check.says,
                "verdict": finding.verdict.value,
                "outcomes": [_outcome(outcome) for outcome in finding.outcomes],
            }
            for finding in findings
        ],
    }


def _outcome(outcome: Outcome) -> dict[str, str]:
    fields = {name: str(getattr(outcome, name)) for name in ("model", "why", "expected", "received", "asked")}
    return {"verdict": outcome.verdict.value, **{name: text for name, text in fields.items() if text}}
