"""Commands measured as whole processes, in turn: what the benchmarks of this folder have in common.

A repetition runs each arm once, in the other order every second time; ratios are taken within a repetition. Before
a run, its inputs are read once and the last output is removed.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import lora_export
from lora_export.storage.disk import sync_tree
from lora_export.storage.sealed import write_json

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "benchmarks" / "results"
LORA_EXPORT = Path(sys.executable).with_name("lora-export")

Command = list[str | Path]
Spread = dict[str, float]


@dataclass(frozen=True)
class Arm:
    """A command that reads the folders `inputs` and makes the file or folder `output`, if any."""

    name: str
    command: Command
    inputs: tuple[Path, ...]
    output: Path


@dataclass(frozen=True)
class Sample:
    """One process: wall time, user and system time, largest resident set of it or of one of its children.

    said: what it wrote to stdout.
    """

    arm: str
    repetition: int
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    said: str = ""

    def raw(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "said"}


def measure(arm: Arm, repetition: int, *, sync: bool = False, settle: float = 4.0, keep: bool = False) -> Sample:
    """Run an arm; remove its output unless `keep`. SystemExit with the end of its stderr if it fails.

    On Linux the largest resident set of a child starts at that of its parent at the fork. So this process stays
    small (no torch; models are built by another process), and what is below its own 25 MB cannot be told.
    """
    read_once(arm.inputs)
    if sync:
        os.sync()
    # A virtual machine gives free memory back to its host within seconds, and getting it again takes time. Without
    # this pause, whoever writes first after the last output was removed would get that memory, and others not.
    time.sleep(settle)
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(arm.command, stdout=subprocess.PIPE, stderr=errors)
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if sync and arm.output.is_dir():
            sync_tree(arm.output)
        seconds = time.perf_counter() - started
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"{arm.name} failed:\n{errors.read().decode(errors='replace')[-4000:]}")
    if not keep:
        remove(arm.output)
    print(f"  {repetition + 1} {arm.name}: {seconds:.2f} s", file=sys.stderr)
    cpu, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
    return Sample(arm.name, repetition, seconds, cpu, peak, said.decode())


def in_turn(arms: Sequence[Arm], repetitions: int, **how: Any) -> list[Sample]:
    return [
        measure(arm, repetition, **how)
        for repetition in range(repetitions)
        for arm in arms[:: 1 if repetition % 2 == 0 else -1]
    ]


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_once(folders: tuple[Path, ...]) -> None:
    """Bring every file into the page cache, as far as there is room."""
    buffer = bytearray(2**20)
    for path in (p for folder in folders for p in sorted(folder.iterdir()) if p.is_file()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def spread(values: Sequence[float]) -> Spread:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def shown(values: Spread, unit: float, form: str) -> str:
    median, least, most = (format(values[k] / unit, form) for k in ("median", "min", "max"))
    return f"{median} ({least}–{most})"


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options `repeat`, `work` and `out` (None: as `work`) of a benchmark and its others, checked; the folders
    are there."""
    options = parser.parse_args()
    if options.repeat < 1:
        parser.error("--repeat must be at least 1")
    options.out = options.out or options.work
    for folder in (options.work, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    return options


def circumstances(work: Path, out: Path) -> dict[str, Any]:
    """Machine, versions and file systems, with nothing that names the machine or its user."""
    from lora_export.benchmarking.environment import describe
    from lora_export.manifest import versions
    from lora_export.storage.documents import as_json

    code = str(Path(lora_export.__file__).parent)
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": as_json(describe()),
        "file_systems": {"inputs": file_system(work), "output": file_system(out)},
        "versions": versions()
        | {"lora-export": first_line("git", "-C", code, "describe", "--always", "--dirty")}
        | {"cp": first_line("cp", "--version")},
    }


def save(path: Path | None, name: str, document: dict[str, Any]) -> None:
    """Write the results to `path`, or to a new file of this name and the date."""
    path = path or RESULTS / f"{name}-{datetime.now():%Y-%m-%d-%H%M%S}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, document)
    print(f"raw samples: {path}")


def first_line(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.partition("\n")[0]


def file_system(folder: Path) -> str:
    import psutil

    mounts = [d for d in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(d.mountpoint)]
    return max(mounts, key=lambda d: len(d.mountpoint)).fstype
