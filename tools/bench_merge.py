"""Time and memory of `lora-export merge` beside `cp -r` of the same bytes and, if asked for, PEFT's and axolotl's.

Every arm is a whole process. A repetition runs each arm once, in the other order every second time; ratios and
differences are taken within a repetition. Before a run, its inputs are read once and the last output is removed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from processes import (
    HERE,
    LORA_EXPORT,
    Arm,
    Command,
    Sample,
    circumstances,
    in_turn,
    parsed,
    save,
    shown,
    spread,
)
from random_models import BASES, KINDS, SHAPES

MEASURED = ("seconds", "cpu_seconds", "peak_rss_bytes")
OURS = ("ours", "certified", "uncertified")
COLUMNS = {
    "seconds": ("wall s", 1, ".2f"),
    "cpu_seconds": ("CPU s", 1, ".2f"),
    "peak_rss_bytes": ("peak MB", 1e6, ".0f"),
    "to_cp": ("× cp", 1, ".2f"),
}

Summary = dict[str, dict[str, dict[str, float]]]


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
        samples = in_turn(arms, options.repeat, sync=options.sync, settle=options.settle)
    return {"base": folder_size(base), "adapter": folder_size(adapter), "output": planned["bytes"]}, samples


def folder_size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir())


def summarize(samples: Sequence[Sample]) -> Summary:
    """Row of the table → column → median, min and max."""
    arms: dict[str, list[Sample]] = {}
    for sample in samples:
        arms.setdefault(sample.arm, []).append(sample)
    rows = {arm: {c: [getattr(s, c) for s in each] for c in MEASURED} for arm, each in arms.items()}
    for name in (n for n in OURS if n in arms):
        rows[f"{name}: merge stage"] = {"seconds": [own(s)["seconds"] for s in arms[name]]}
    rows["ours − imports"] = {
        c: [a - b for a, b in zip(rows["ours"][c], rows["imports"][c], strict=True)] for c in MEASURED
    }
    for row in rows.values():
        row["to_cp"] = [a / b for a, b in zip(row["seconds"], rows["cp"]["seconds"], strict=True)]
    return {name: {c: spread(values) for c, values in row.items()} for name, row in rows.items()}


def own(sample: Sample) -> dict[str, Any]:
    """What `lora-export merge` reports of itself: its stage from the plan to the synced output, which includes
    importing torch but not the start of Python, and its own largest resident set."""
    said = json.loads(sample.said)
    return {"seconds": said["seconds"], "peak_rss_bytes": said["peak_rss_bytes"]}


def raw(sample: Sample) -> dict[str, Any]:
    if sample.arm not in OURS:
        return sample.raw()
    return sample.raw() | {
        "merge_seconds": own(sample)["seconds"],
        "reported_peak_rss_bytes": own(sample)["peak_rss_bytes"],
    }


def table(summary: Summary) -> str:
    lines = [" " * 18 + "".join(f"{title:>25}" for title, _, _ in COLUMNS.values())]
    for name, row in summary.items():
        cells = (shown(row[c], unit, form) if c in row else "" for c, (_, unit, form) in COLUMNS.items())
        lines.append(f"{name:<18}" + "".join(f"{text:>25}" for text in cells))
    return "\n".join(lines)


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
    return parsed(parser)


def main() -> None:
    options = parse()
    load = [os.getloadavg()]
    sizes, samples = run(options)
    load.append(os.getloadavg())
    summary, around = summarize(samples), circumstances(options.work, options.out)
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
    chosen = {name: getattr(options, name) for name in ("size", "base", "kind", "repeat", "sync", "settle")}
    chosen |= {"with": sorted({s.arm for s in samples} - {"imports", "cp", "ours"})}
    document = around | {"options": chosen, "bytes": sizes, "load": load, "summary": summary}
    save(options.save, f"merge-{options.size}-{kind}", document | {"samples": [raw(s) for s in samples]})


if __name__ == "__main__":
    main()
