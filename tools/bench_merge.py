"""Time and memory of `lora-export merge` beside `cp -r` of the same bytes and, if asked for, PEFT's and axolotl's.

Every arm is a whole process. A repetition runs each arm once, in the other order every second time; ratios and
differences are taken within a repetition. Before a run, its inputs are read once and the last output is removed.
"""

import argparse
import json
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

from random_models import BASES, KINDS, SHAPES

import lora_export
from lora_export.files import sync_tree, write_json

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "benchmarks" / "results"
LORA_EXPORT = Path(sys.executable).with_name("lora-export")
MEASURED = ("seconds", "cpu_seconds", "peak_rss_bytes")
OURS = ("ours", "certified", "uncertified")
COLUMNS = {
    "seconds": ("wall s", 1, ".2f"),
    "cpu_seconds": ("CPU s", 1, ".2f"),
    "peak_rss_bytes": ("peak MB", 1e6, ".0f"),
    "to_cp": ("× cp", 1, ".2f"),
}

Command = list[str | Path]
Summary = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class Arm:
    """A command that reads the folders `inputs` and makes the folder `output`, if any."""

    name: str
    command: Command
    inputs: tuple[Path, ...]
    output: Path


@dataclass(frozen=True)
class Sample:
    """One process: wall time, user and system time, largest resident set.

    The last two are what `lora-export merge` reports of itself: its stage from the plan to the synced output,
    which includes importing torch but not the start of Python, and its own largest resident set.
    """

    arm: str
    repetition: int
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    merge_seconds: float | None = None
    reported_peak_rss_bytes: int | None = None


def measure(arm: Arm, repetition: int, sync: bool, settle: float) -> Sample:
    """Run an arm and remove its output. SystemExit with the end of its stderr if it fails.

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
    shutil.rmtree(arm.output, ignore_errors=True)
    print(f"  {repetition + 1} {arm.name}: {seconds:.2f} s", file=sys.stderr)
    own = json.loads(said) if arm.name in OURS else {}
    cpu, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
    return Sample(arm.name, repetition, seconds, cpu, peak, own.get("seconds"), own.get("peak_rss_bytes"))


def read_once(folders: tuple[Path, ...]) -> None:
    """Bring every file into the page cache, as far as there is room."""
    buffer = bytearray(2**20)
    for path in (p for folder in folders for p in sorted(folder.iterdir())):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def merge_command(base: Path, adapter: Path, output: Path) -> Command:
    return [LORA_EXPORT, "merge", "-b", base, "-a", adapter, "-o", output, "--json", "-q"]


def arms_of(base: Path, adapter: Path, copied: Path, output: Path, options: argparse.Namespace) -> list[Arm]:
    """`copied` is what cp copies: as many bytes as the merge writes."""
    others = {"peft": sys.executable if options.with_peft else None, "axolotl": options.with_axolotl}
    arms = [
        Arm("imports", [sys.executable, "-c", "import numpy, torch"], (), output),
        Arm("cp", ["cp", "-r", copied, output], (copied,), output),
        Arm("ours", merge_command(base, adapter, output), (base, adapter), output),
    ]
    if options.uncertified:
        plain: Command = [sys.executable, HERE / "merge_uncertified.py", base, adapter, output]
        arms.append(Arm("certified", [*plain, "certified"], (base, adapter), output))
        arms.append(Arm("uncertified", plain, (base, adapter), output))
    for name, python in others.items():
        if python:
            command: Command = [python, HERE / f"merge_with_{name}.py", base, adapter, output]
            arms.append(Arm(name, command, (base, adapter), output))
    return arms


def run(options: argparse.Namespace) -> tuple[dict[str, int], list[Sample]]:
    """Bytes of base, adapter and output, and every sample. Outputs are removed, models stay in `options.work`."""
    models: Command = [options.work, options.size, options.base, options.kind]
    subprocess.run([sys.executable, HERE / "random_models.py", *models], check=True)
    base, adapter = (options.work / options.size / name for name in (options.base, options.kind))
    with (
        tempfile.TemporaryDirectory(prefix="bench-merge-", dir=options.out) as scratch,
        tempfile.TemporaryDirectory(prefix="bench-merge-", dir=options.work) as kept,
    ):
        output, copied = Path(scratch, "output"), base
        # Besides telling the size, the dry run compiles the code and loads it once.
        dry_run = [*merge_command(base, adapter, output), "--dry-run"]
        planned = json.loads(subprocess.run(dry_run, check=True, stdout=subprocess.PIPE).stdout)
        if options.base == "nf4":
            copied = Path(kept, "merged")
            subprocess.run(merge_command(base, adapter, copied), check=True, stdout=subprocess.DEVNULL)
        arms = arms_of(base, adapter, copied, output, options)
        samples = [
            measure(arm, repetition, options.sync, options.settle)
            for repetition in range(options.repeat)
            for arm in arms[:: 1 if repetition % 2 == 0 else -1]
        ]
    return {"base": folder_size(base), "adapter": folder_size(adapter), "output": planned["bytes"]}, samples


def folder_size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir())


def summarize(samples: Sequence[Sample]) -> Summary:
    """Row of the table → column → median, min and max."""
    arms: dict[str, list[Sample]] = {}
    for sample in samples:
        arms.setdefault(sample.arm, []).append(sample)
    rows = {arm: {c: [getattr(s, c) for s in own] for c in MEASURED} for arm, own in arms.items()}
    for name in (n for n in OURS if n in arms):
        rows[f"{name}: merge stage"] = {"seconds": [s.merge_seconds for s in arms[name]]}
    rows["ours − imports"] = {
        c: [a - b for a, b in zip(rows["ours"][c], rows["imports"][c], strict=True)] for c in MEASURED
    }
    for row in rows.values():
        row["to_cp"] = [a / b for a, b in zip(row["seconds"], rows["cp"]["seconds"], strict=True)]
    return {name: {c: spread(values) for c, values in row.items()} for name, row in rows.items()}


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def table(summary: Summary) -> str:
    lines = [" " * 18 + "".join(f"{title:>25}" for title, _, _ in COLUMNS.values())]
    for name, row in summary.items():
        cells = (cell(row[c], unit, form) if c in row else "" for c, (_, unit, form) in COLUMNS.items())
        lines.append(f"{name:<18}" + "".join(f"{text:>25}" for text in cells))
    return "\n".join(lines)


def cell(values: dict[str, float], unit: float, form: str) -> str:
    median, least, most = (format(values[k] / unit, form) for k in ("median", "min", "max"))
    return f"{median} ({least}–{most})"


def circumstances(options: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions and file systems, with nothing that names the machine or its user."""
    from lora_export.benchmark.environment import describe
    from lora_export.manifest import versions

    code = str(Path(lora_export.__file__).parent)
    return {
        "machine": describe(),
        "file_systems": {"inputs": file_system(options.work), "output": file_system(options.out)},
        "versions": versions()
        | {"lora-export": first_line("git", "-C", code, "describe", "--always", "--dirty")}
        | {"cp": first_line("cp", "--version")},
    }


def first_line(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.partition("\n")[0]


def file_system(folder: Path) -> str:
    import psutil

    mounts = [d for d in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(d.mountpoint)]
    return max(mounts, key=lambda d: len(d.mountpoint)).fstype


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="0.1B", help="shape of the base (default: %(default)s)")
    parser.add_argument("--base", choices=BASES, default="bf16", help="how it is stored (default: %(default)s)")
    parser.add_argument("--kind", choices=KINDS, default="lora", help="kind of adapter (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions (default: %(default)s)")
    parser.add_argument("--with-peft", action="store_true", help="measure PEFT's merge_and_unload, too (slow)")
    parser.add_argument(
        "--with-axolotl",
        metavar="PYTHON",
        help="measure axolotl's merge, with the Python that has it",
    )
    parser.add_argument(
        "--uncertified",
        action="store_true",
        help="measure the merge through the Python API with and without its certificate, too",
    )
    parser.add_argument(
        "--settle", type=float, default=4.0, help="seconds of rest before every run (default: %(default)s)"
    )
    parser.add_argument("--sync", action="store_true", help="fsync every output inside its time: for a disk")
    work = Path(tempfile.gettempdir(), "lora-export-bench")
    parser.add_argument(
        "--work", type=Path, default=work, help="folder that keeps the models (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="folder for the outputs, such as /dev/shm (default: --work)")
    parser.add_argument("--save", type=Path, help="JSON file to write (default: a new one in benchmarks/results)")
    options = parser.parse_args()
    if options.repeat < 1:
        parser.error("--repeat must be at least 1")
    options.out = options.out or options.work
    for folder in (options.work, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    return options


def main() -> None:
    options = parse()
    load = [os.getloadavg()]
    sizes, samples = run(options)
    load.append(os.getloadavg())
    summary, around, date = summarize(samples), circumstances(options), datetime.now().astimezone()
    systems = around["file_systems"]
    print(
        f"{options.kind} on {options.size} in {options.base}, {sizes['base'] / 1e9:.2f} GB on {systems['inputs']}, "
        f"to {sizes['output'] / 1e9:.2f} GB on {systems['output']}{', synced' * options.sync}; "
        f"{options.repeat} repetitions, median (least–most)"
    )
    print(table(summary))
    if systems["output"] != "tmpfs" and not options.sync:
        print("Only ours syncs its output to the disk: --sync makes the others do it, too.", file=sys.stderr)
    kind = f"{options.kind}-nf4" if options.base == "nf4" else options.kind
    path = options.save or RESULTS / f"merge-{options.size}-{kind}-{date:%Y-%m-%d-%H%M%S}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = {name: getattr(options, name) for name in ("size", "base", "kind", "repeat", "sync", "settle")}
    chosen |= {"with": sorted({s.arm for s in samples} - {"imports", "cp", "ours"})}
    head = {"date": date.isoformat(timespec="seconds"), "options": chosen, "bytes": sizes, "load": load}
    write_json(path, head | around | {"summary": summary, "samples": [asdict(s) for s in samples]})
    print(f"raw samples: {path}")


if __name__ == "__main__":
    main()
