"""What an export costs: the next adapter beside a copy and the first export, and ours beside the builder alone.

    python tools/bench_export.py                              # SmolLM2-135M and an adapter of the examples
    python tools/bench_export.py --precision fp32 int4 --repeat 3

Arms, each a whole process:

    builder   the builder alone, from its own command line, on the base in the same precision
    first     `lora-export export -m TUNED`
    next      `lora-export export -m TUNED --graph-from BASE_ONNX`
    copy      `cp -r` of the export that `next` takes the graph from: as many bytes as it writes

`next` must write the same bytes as `first`, graph and data, or the benchmark ends with an error.
"""

import argparse
import filecmp
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from processes import (
    LORA_EXPORT,
    Arm,
    Command,
    Sample,
    circumstances,
    in_turn,
    measure,
    remove,
    save,
    shown,
    spread,
)

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
RATIOS = (("first", "builder"), ("next", "copy"), ("first", "next"))


def prepared() -> tuple[Path, Path]:
    """SmolLM2, and a trained adapter for it."""
    made = subprocess.run(
        [sys.executable, EXAMPLES / "prepare_smollm2.py"], check=True, stdout=subprocess.PIPE, text=True
    )
    return Path(made.stdout.strip()), EXAMPLES / "adapters" / "lora-speeches"


def export_command(model: Path, output: Path, *more: str | Path) -> Command:
    return [LORA_EXPORT, "export", "-m", model, "-o", output, "--json", "-q", *more]


def as_asked(precision: str) -> Command:
    """bf16 for CUDA: there is no bf16 product on a CPU, but a graph can be made anywhere."""
    return ["--precision", precision, "--provider", "cuda" if precision == "bf16" else "cpu"]


def arms_of(precision: str, base: Path, tuned: Path, earlier: Path, output: Path) -> list[Arm]:
    """earlier: the export of the base, of which `next` takes the graph."""
    fresh = export_command(tuned, output / "first", *as_asked(precision))
    again = export_command(tuned, output / "next", "--graph-from", earlier)
    arms = [
        Arm("first", fresh, (tuned,), output / "first"),
        Arm("next", again, (tuned, earlier), output / "next"),
        Arm("copy", ["cp", "-r", earlier, output / "copy"], (earlier,), output / "copy"),
    ]
    kind, provider = as_asked(precision)[1::2]
    builder: Command = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        base,
        "-p",
        kind,
        "-e",
        provider,
    ]
    builder += ["-o", output / "builder", "-c", output / "cache", "--extra_options", "hf_token=false"]
    builder += ["int4_accuracy_level=4"] * (precision == "int4")
    return [*arms, Arm("builder", builder, (base,), output / "builder")]


def run(base: Path, tuned: Path, precision: str, options: argparse.Namespace) -> list[Sample]:
    with tempfile.TemporaryDirectory(prefix="bench-export-", dir=options.out) as scratch:
        earlier = Path(scratch, "earlier")
        subprocess.run(export_command(base, earlier, *as_asked(precision)), check=True, stdout=subprocess.DEVNULL)
        arms = arms_of(precision, base, tuned, earlier, Path(scratch))
        compared = [arm for arm in arms if arm.name in ("first", "next")]
        for arm in compared:
            measure(arm, -1, settle=0, keep=True)
        refuse_difference(*(arm.output for arm in compared))
        for arm in compared:
            remove(arm.output)
        return in_turn(arms, options.repeat, sync=options.sync, settle=options.settle)


def refuse_difference(first: Path, following: Path) -> None:
    for path in sorted(p for p in first.iterdir() if p.name not in ("export.json",)):
        if not filecmp.cmp(path, following / path.name, shallow=False):
            raise SystemExit(f"{path.name} differs between the first export and the next")


def summarize(samples: Sequence[Sample]) -> dict[str, Any]:
    """Arm → median, least and most; and ratios, each within a repetition."""
    of: dict[str, list[Sample]] = {}
    for sample in samples:
        of.setdefault(sample.arm, []).append(sample)
    summary: dict[str, Any] = {
        name: {c: spread([getattr(s, c) for s in own]) for c in ("seconds", "cpu_seconds", "peak_rss_bytes")}
        for name, own in of.items()
    }
    for a, b in RATIOS:
        if a in of and b in of:
            pairs = zip(of[a], of[b], strict=True)
            summary[f"{a} / {b}"] = {"seconds": spread([x.seconds / y.seconds for x, y in pairs])}
    return summary


def main() -> None:
    options = parse()
    base, adapter = (options.base, options.adapter) if options.base else prepared()
    results = {}
    with tempfile.TemporaryDirectory(prefix="bench-export-", dir=options.work) as kept:
        tuned = Path(kept, "tuned")
        merge: Command = [LORA_EXPORT, "merge", "-b", base, "-a", adapter, "-o", tuned, "-q"]
        subprocess.run(merge, check=True, stdout=subprocess.DEVNULL)
        for precision in options.precision:
            load = os.getloadavg()
            samples = run(base, tuned, precision, options)
            results[precision] = {
                "summary": summarize(samples),
                "samples": [s.raw() for s in samples],
                "load": [load, os.getloadavg()],
            }
            show(precision, results[precision]["summary"])
    document = circumstances(options.work, options.out) | {
        "model": base.resolve().name,
        "options": {"repeat": options.repeat, "settle": options.settle, "sync": options.sync},
        "precisions": results,
    }
    save(options.save, f"export-{base.resolve().name}", document)


def show(precision: str, summary: dict[str, Any]) -> None:
    print(f"{precision}: median (least–most)")
    for name, row in summary.items():
        peak = shown(row["peak_rss_bytes"], 1e6, ".0f") + " MB" if "peak_rss_bytes" in row else ""
        unit = " s" if peak else " ×"
        print(f"  {name:<16} {shown(row['seconds'], 1, '.2f') + unit:<26} {peak}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="another base than SmolLM2, with --adapter")
    parser.add_argument("--adapter", type=Path, help="an adapter of that base")
    parser.add_argument("--precision", nargs="+", default=["fp32", "fp16", "bf16", "int4"], metavar="PRECISION")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions (default: %(default)s)")
    parser.add_argument(
        "--settle", type=float, default=2.0, help="seconds of rest before every run (default: %(default)s)"
    )
    parser.add_argument("--sync", action="store_true", help="fsync every output inside its time: for a disk")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()), help="folder for the merged model"
    )
    parser.add_argument("--out", type=Path, help="folder for the outputs, such as /dev/shm (default: --work)")
    parser.add_argument("--save", type=Path, help="JSON file to write (default: a new one in benchmarks/results)")
    options = parser.parse_args()
    if bool(options.base) != bool(options.adapter):
        parser.error("--base and --adapter belong together")
    options.out = options.out or options.work
    return options


if __name__ == "__main__":
    main()
