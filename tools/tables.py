"""Results, and Markdown tables of them."""

import json
from collections.abc import Sequence
from typing import Any

from generated import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def read(pattern: str) -> Any:
    """The newest result of this name."""
    found = sorted(RESULTS.glob(pattern))
    if not found:
        raise SystemExit(f"no result {pattern} in {RESULTS}")
    return json.loads(found[-1].read_text(encoding="utf-8"))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n" + "".join(f"| {' | '.join(row)} |\n" for row in lines) + "\n"
