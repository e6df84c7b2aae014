"""Does a server keep the contract? `python -m pullback.conformance TARGET` asks it, at the level of the wire.

The server may be written in any language: it is asked for its models, inputs are made from their signatures, and the
derivatives that it answers are held against each other and against central differences.

    for finding in run("localhost:8470", models=["energy"]):
        print(finding.check.id, finding.verdict)

Needs what `pullback` needs, no torch.
"""

from pullback.conformance._check import Check, Finding, Outcome, Verdict
from pullback.conformance._run import NotServing, checks, run

__all__ = ["Check", "Finding", "NotServing", "Outcome", "Verdict", "checks", "run"]
