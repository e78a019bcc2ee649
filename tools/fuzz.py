"""Try the properties of tests/fuzz for as long as one likes.

    python tools/fuzz.py --minutes 10 --only onnx

Prints for each harness the examples tried and every different failure once, shrunk; exits 1 if there is any. What
failed stays in .hypothesis and is tried first the next time.
"""

import argparse
import functools
import importlib
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.errors import HypothesisWarning

import tests.conftest  # noqa: F401  - keeps every library off the network
from tests.fuzz import guard
from tests.fuzz.guard import HARNESSES, Harness

ROOT = Path(__file__).parents[1]


class TimeIsUp(BaseException):
    """Hypothesis lets what is no Exception through at once."""


def fuzz(harness: Harness, seconds: float, log: Path | None) -> tuple[int, dict[str, str]]:
    """(examples tried, failures: where → the traceback of the smallest example). A failure does not end it."""
    tried, known = 0, dict[str, str]()
    end = time.monotonic() + seconds

    @functools.wraps(harness.check)
    def timed(**arguments: Any) -> None:
        nonlocal tried
        if time.monotonic() > end:
            raise TimeIsUp
        tried += 1
        if log is not None:
            log.write_text(repr(arguments))  # what a crash of the interpreter leaves behind
        try:
            harness.check(**arguments)
        except Exception as error:
            if _signature(error) not in known:
                raise

    database = DirectoryBasedExampleDatabase(ROOT / ".hypothesis" / "examples")
    endless = settings(
        max_examples=10**9, deadline=None, database=database, suppress_health_check=list(HealthCheck),
        phases=(Phase.reuse, Phase.generate, Phase.shrink), print_blob=False, report_multiple_bugs=False,
    )  # fmt: skip
    rounds = 0
    while time.monotonic() < end:
        rounds += 1
        test = seed(time.time_ns())(endless(given(**harness.strategies)(timed)))
        try:
            test()
        except TimeIsUp:
            break
        except Exception as error:
            known[_signature(error)] = "".join(traceback.format_exception(error)[-12:])
            print(f"{harness.name}: {_signature(error)}\n{known[_signature(error)]}", flush=True)
    return tried, known


def _signature(error: Exception) -> str:
    """The innermost line of the package, and what was raised there."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/lora_export/" in f.filename] or frames
    where = ours[-1]
    return f"{type(error).__name__} at {Path(where.filename).name}:{where.name}: {where.line}"


def _cost() -> str:
    """What the harness's inputs took at most, where it measures them."""
    worst = guard.WORST
    if not worst.seconds:
        return ""
    return f"; at most {worst.seconds:.2f} s, {worst.rate:.2f} s for a MB, {worst.memory / 2**20:.0f} MiB"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, required=True, help="for each harness")
    parser.add_argument("--only", help="harnesses whose name holds this")
    parser.add_argument("--log", type=Path, help="a file that holds the example being tried, for crashes")
    options = parser.parse_args()
    warnings.simplefilter("ignore", HypothesisWarning)
    for path in sorted((ROOT / "tests" / "fuzz").glob("test_*.py")):
        importlib.import_module(f"tests.fuzz.{path.stem}")
    os.chdir(ROOT)
    failed = 0
    for harness in HARNESSES:
        if not options.only or options.only in harness.name:
            guard.WORST = guard.Worst()
            tried, failures = fuzz(harness, options.minutes * 60, options.log)
            failed += len(failures)
            print(f"{harness.name}: {tried:,} examples, {len(failures)} failures{_cost()}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
