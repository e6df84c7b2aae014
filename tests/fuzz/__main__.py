"""Coverage-guided fuzzing of one target. Run: python -m tests.fuzz TARGET [CORPUS] [-max_total_time=60, ...]

The options are libFuzzer's. Ends with another status than 0 at the first input that breaks the target's promise, which
it then prints; such an input belongs into test_fuzz.py.
"""

from __future__ import annotations

import random
import sys

import atheris

with atheris.instrument_imports(include=["pullback_wire", "pullback_server"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        raise SystemExit(f"{__doc__}\nTargets: {', '.join(TARGETS)}")
    target = TARGETS[sys.argv.pop(1)]

    def one(data: bytes) -> None:
        try:
            target(data)
        except BaseException:
            print("input:", data, flush=True)
            raise

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        rng = random.Random(seed)
        assert target.mutate is not None
        # libFuzzer's own mutations know what the program compares with.
        if rng.random() < 0.3:
            return bytes(atheris.Mutate(data, len(data) + 64))[:longest]
        return target.mutate(bytes(data), rng)[:longest]

    # Of its memory libFuzzer knows the peak, into which what started this process counts: the suite has some GiB.
    limits = ["-timeout=5", "-rss_limit_mb=8192", "-malloc_limit_mb=256"]
    if target.mutate is None:
        atheris.Setup([sys.argv[0], *limits, *sys.argv[1:]], one)
    else:
        atheris.Setup([sys.argv[0], *limits, *sys.argv[1:]], one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
