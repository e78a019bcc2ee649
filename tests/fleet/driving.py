"""A driver in a process of its own, with fake work: `python -m tests.fleet.driving ROOT SCRATCH ROWS [TIMEOUT]`.

It plans as a fleet does: what the root has is skipped. The last line says what became of the rows.
"""

import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

from lora_export.contracts.fleet import FleetOptions, PlannedRow
from lora_export.fleet.board import Board
from lora_export.fleet.claims import Claims
from lora_export.fleet.driver import drive, name_it
from lora_export.fleet.engines.local import LocalEngine
from lora_export.fleet.scratch import sweep
from lora_export.fleet.stores import opened
from lora_export.progress import Silent
from tests.fleet import fakes

REPOSITORY = Path(__file__).parents[2]


def rows(count: int) -> list[PlannedRow]:
    """Short rows of two bases."""
    return [fakes.planned(f"short-{i}@{i % 2}", base_key=f"base{i % 2}") for i in range(count)]


def main(root: str, scratch: str, count: str, timeout: str = "60") -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    store = opened(root)
    sweep(Path(scratch))
    with Claims(store):
        pass
    there = store.records("objects")
    planned = [replace(p, state="skipped") if p.key in there else p for p in rows(int(count))]
    for row in planned:
        if row.state == "skipped":
            name_it(store, row.row.name, row.key)
    told: tuple[object, ...] = ()
    if any(p.state is None for p in planned):
        with LocalEngine(fakes.WORK, 2, Path(scratch)) as engine:
            told, _ = drive(
                planned, engine, store=store, root=root, scratch=Path(scratch),
                options=FleetOptions(timeout=float(timeout)), board=Board(planned, Silent(), 2),
            )  # fmt: skip
    sys.stdout.write(f"{dict(Counter(getattr(t, 'state', '') for t in told))}\n")


def started(root: Path, scratch: Path, count: int, log: Path | None = None) -> "subprocess.Popen[str]":
    variables = os.environ | {"PYTHONPATH": f"{REPOSITORY}"} | ({"FAKES_LOG": str(log)} if log else {})
    return subprocess.Popen(
        [sys.executable, "-m", "tests.fleet.driving", str(root), str(scratch), str(count)],
        stdout=subprocess.PIPE, text=True, env=variables, cwd=REPOSITORY,
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
