"""Kill workers, raylets or the driver of a fleet on Ray at random moments, and look whether anything is lost.

    python tools/fleet_kills.py worker|raylet|driver --kills 50

A cluster of three raylets on this machine (`driver` also: each driver's own Ray) does quick rows that write objects
of several files to a folder, as real rows publish theirs. After each fleet: every row is done, or told as died;
no object mixes two attempts or lacks a file; no worker is left; the same command does what is missing.
"""

import argparse
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.fleet import deeds
from tests.fleet.cluster import Raylets, gone, raylets, workers

HERE = Path(__file__).resolve().parent
SECONDS = 600  # for one fleet
_NODES = 3


@dataclass
class Found:
    """What was seen: kills, rows by state after the fleet, wrong: everything that should not be."""

    kills: int = 0
    fleets: int = 0
    states: Counter[str] = field(default_factory=Counter)
    again: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def drive(root: Path, scratch: Path, told: Path, rows: int, workers: int) -> None:
    """One fleet of quick rows on Ray, in this process; what became of each row goes to `told`."""
    from lora_export.contracts import FleetOptions
    from lora_export.fleet.board import Board
    from lora_export.fleet.driver import drive as driven
    from lora_export.fleet.engines.ray import RayEngine
    from lora_export.fleet.stores import opened
    from lora_export.progress import Silent

    planned = [deeds.task(f"row{i}", scratch).planned for i in range(rows)]
    options = FleetOptions(on="ray", timeout=60.0)
    with RayEngine("ray", deeds.write, workers=workers, root=str(root)) as engine:
        outcomes, _ = driven(
            planned, engine, store=opened(str(root)), root=str(root), scratch=scratch, options=options,
            board=Board(planned, Silent(), len(engine.slots)),
        )  # fmt: skip
    told.write_text(json.dumps({o.name: o.state for o in outcomes}))


class Fleet:
    """A driver in a process of its own, on a root of its own."""

    def __init__(self, work: Path, rows: int, workers: int) -> None:
        self.root, self.scratch, self.told = work / "root", work / "scratch", work / "told.json"
        self.rows, self.workers = rows, workers
        for folder in (self.root, self.scratch):
            folder.mkdir(parents=True)
        self.process = self.start()

    def start(self) -> "subprocess.Popen[bytes]":
        self.told.unlink(missing_ok=True)
        given = (self.root, self.scratch, self.told, self.rows, self.workers)
        command = [sys.executable, HERE / Path(__file__).name, "drive", *map(str, given)]
        return subprocess.Popen(command, cwd=HERE.parent)

    def done(self) -> int:
        return len(list((self.root / "objects").glob("*/record.json")))

    def states(self) -> dict[str, str]:
        return json.loads(self.told.read_text()) if self.told.exists() else {}

    def mixed(self) -> Iterator[str]:
        """Objects that are not what one attempt left."""
        from lora_export.errors import LoraExportError
        from lora_export.fleet.stores import opened

        store = opened(str(self.root))
        for folder in sorted((self.root / "objects").iterdir()):
            target = self.scratch.parent / "fetched"
            shutil.rmtree(target, ignore_errors=True)
            try:
                if store.fetch(f"objects/{folder.name}", target) is None:
                    yield f"{folder.name} has no record"
                    continue
            except LoraExportError as error:
                yield f"{folder.name}: {error.found}"
                continue
            parts = [p.read_bytes() for p in sorted(target.rglob("bytes"))]
            if len(parts) != deeds.PARTS or len(set(parts)) != 1:
                yield f"{folder.name} mixes attempts, or lacks files"


def judged(fleet: Fleet, found: Found, *, ended: bool) -> None:
    """Look at what a fleet left, run it again without kills, and look again. ended: its driver told every row."""
    names = {f"row{i}" for i in range(fleet.rows)}
    states = fleet.states()
    if ended and set(states) != names:
        found.wrong.append(f"{len(names - set(states))} rows were not told")
    found.states.update(states.values())
    found.wrong += list(fleet.mixed()) if (fleet.root / "objects").is_dir() else []
    finished = {n for n, s in states.items() if s in ("done", "skipped")}
    there = {p.parent.name for p in (fleet.root / "objects").glob("*/record.json")}
    found.wrong += [f"{n} was told as done, and is not there" for n in finished if f"key-of-{n}" not in there]
    if fleet.start().wait(SECONDS):
        found.wrong.append("the fleet that was run again failed")
    again = fleet.states()
    found.again.update(again.values())
    found.wrong += [f"{n} is {again.get(n)} in the end" for n in names if again.get(n) not in ("done", "skipped")]
    found.wrong += list(fleet.mixed())
    if not gone(workers(), 30):
        found.wrong.append("workers are left")
    found.fleets += 1
    print(
        f"  {found.kills} kills, {found.fleets} fleets, {dict(found.states)}, wrong: {found.wrong}", file=sys.stderr
    )


def kill_workers(work: Path, kills: int, draw: random.Random, cluster: Raylets) -> Found:
    found = Found()
    while found.kills < kills:
        fleet = Fleet(work / f"fleet{found.fleets}", rows=150, workers=_NODES)
        while fleet.process.poll() is None:
            time.sleep(draw.uniform(0.05, 2.0))
            if found.kills < kills and fleet.done() and (alive := workers()):
                try:
                    draw.choice(alive).kill()
                except psutil.NoSuchProcess:
                    continue
                found.kills += 1
        judged(fleet, found, ended=True)
    return found


def kill_raylets(work: Path, kills: int, draw: random.Random, cluster: Raylets) -> Found:
    found = Found()
    while found.kills < kills:
        fleet = Fleet(work / f"fleet{found.fleets}", rows=300, workers=_NODES)
        while fleet.process.poll() is None:
            time.sleep(draw.uniform(0.05, 2.0))
            if found.kills < kills and fleet.done():
                cluster.kill(draw.randrange(cluster.others))
                found.kills += 1
                cluster.add()
        judged(fleet, found, ended=True)
    return found


def kill_drivers(work: Path, kills: int, draw: random.Random, cluster: Raylets | None) -> Found:
    """Every second moment from the start on, the others while rows are written."""
    found = Found()
    for number in range(kills):
        fleet = Fleet(work / f"fleet{number}", rows=30, workers=_NODES if cluster else 2)
        begun = time.monotonic()
        while number % 2 and not fleet.done() and fleet.process.poll() is None and time.monotonic() - begun < 60:
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 2.0 if number % 2 else 10.0))
        own = fleet_processes(fleet.process.pid)
        if fleet.process.poll() is None:
            found.kills += 1
        fleet.process.send_signal(signal.SIGKILL)
        fleet.process.wait()
        if not gone([*workers(), *own], 60):
            found.wrong.append(f"after kill {number} processes of the dead driver are left")
        judged(fleet, found, ended=False)
    return found


def fleet_processes(pid: int) -> list[psutil.Process]:
    """What a driver has started."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@contextmanager
def _cluster(kind: str) -> Iterator[Raylets | None]:
    if kind == "own-driver":
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        yield None
        return
    with raylets(_NODES) as cluster:
        os.environ |= cluster.variables
        yield cluster


KINDS: dict[str, Any] = {
    "worker": kill_workers, "raylet": kill_raylets, "driver": kill_drivers, "own-driver": kill_drivers,
}  # fmt: skip


def kill(kind: str, kills: int, work: Path, seed: int) -> Found:
    with _cluster(kind) as cluster:
        found: Found = KINDS[kind](work, kills, random.Random(seed), cluster)
    return found


def main() -> None:
    if sys.argv[1:2] == ["drive"]:
        root, scratch, told, rows, count = sys.argv[2:]
        drive(Path(root), Path(scratch), Path(told), int(rows), int(count))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=[*KINDS], help="own-driver: a driver that has started Ray itself")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="results go here; default: benchmarks/results/fleet-kills-…")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fleet-kills-") as work:
        found = kill(options.kind, options.kills, Path(work), options.seed)
    document = asdict(found) | {"kind": options.kind, "seed": options.seed, "seconds": time.monotonic() - started}
    print(json.dumps(document))
    from tools.processes import circumstances, save

    save(options.json, f"fleet-kills-{options.kind}", document | circumstances(HERE, HERE))
    if found.wrong:
        raise SystemExit("\n".join(found.wrong[:20]))


if __name__ == "__main__":
    main()
