"""Minutes of load, harm and chaos against servers of their own, by sections; what is printed is measured.

Ends with status 1 when a figure is not as it should be. Each section also runs by itself: soak_sessions.py,
soak_overload.py, soak_fairness.py, soak_chaos.py, soak_lifecycle.py, soak_fuzz.py.
Run: python benchmarks/soak.py [SECTION ...]
"""

import argparse
from collections.abc import Callable

from soak_chaos import chaos
from soak_fairness import fairness
from soak_fuzz import fuzz
from soak_lifecycle import lifecycle
from soak_overload import overload
from soak_sessions import workers_and_sessions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = ("sessions", "overload", "fairness", "chaos", "lifecycle", "fuzz")
    parser.add_argument("section", nargs="*", metavar="SECTION", help=f"{', '.join(names)} [default: all]")
    parser.add_argument("--seconds", type=float, default=120, help="of stateless calls under killed workers")
    parser.add_argument("--cycles", type=int, default=10_000, help="forward and backward cycles in sessions")
    parser.add_argument("--overload-seconds", type=float, default=60)
    parser.add_argument("--fairness-seconds", type=float, default=20, help="of each measurement")
    parser.add_argument("--chaos-seconds", type=float, default=300)
    parser.add_argument("--changes", type=int, default=200, help="of the versions that are served")
    parser.add_argument("--fuzz-seconds", type=float, default=600, help="of hostile bytes")
    arguments = parser.parse_args()
    sections: dict[str, Callable[[], list[str]]] = {
        "sessions": lambda: workers_and_sessions(arguments.seconds, arguments.cycles),
        "overload": lambda: overload(arguments.overload_seconds),
        "fairness": lambda: fairness(arguments.fairness_seconds),
        "chaos": lambda: chaos(arguments.chaos_seconds),
        "lifecycle": lambda: lifecycle(arguments.changes),
        "fuzz": lambda: fuzz(arguments.fuzz_seconds),
    }
    if unknown := set(arguments.section) - set(names):
        parser.error(f"no section is called {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    failed = {name: sections[name]() for name in arguments.section or names}
    print()
    for name, figures in failed.items():
        print(f"{name:<12} {'failed: ' + ', '.join(figures) if figures else 'as it should be'}")
    if any(failed.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
