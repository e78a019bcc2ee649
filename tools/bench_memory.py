"""Peak memory and time of merge and export by the size of the model, and the line through them.

    python tools/bench_memory.py --size 0.1B 1.1B 3B

For each size a random base in bf16 and a LoRA on all linear layers: `lora-export merge`, `export` of the merged
folder, and `export --graph-from` of it; fp16 for CUDA, as a large model would go. Each is a whole process; its peak
is the largest sum over it and its children, looked at every 20 ms. The fit tells the bytes of memory for a byte of
model, and so what a model of another size needs.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from processes import HERE, LORA_EXPORT, Command, circumstances, remove, save

PAUSE = 0.02  # seconds between two looks at the processes


def peak_of(command: Command) -> dict[str, float]:
    """Wall seconds and the largest resident set of the whole tree of processes. SystemExit if it fails."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        largest, over = 0, threading.Event()

        def watch() -> None:
            nonlocal largest
            root = psutil.Process(process.pid)
            while not over.is_set():
                largest = max(largest, _resident(root))
                time.sleep(PAUSE)

        watching = threading.Thread(target=watch)
        watching.start()
        code = process.wait()
        over.set()
        watching.join()
        if code:
            errors.seek(0)
            raise SystemExit(f"{command[1]} failed:\n{errors.read().decode(errors='replace')[-4000:]}")
    return {"seconds": time.perf_counter() - started, "peak_rss_bytes": largest}


def _resident(root: psutil.Process) -> int:
    total = 0
    try:
        for process in (root, *root.children(recursive=True)):
            total += process.memory_info().rss
    except psutil.Error:  # one of them has ended
        pass
    return total


def stages(base: Path, adapter: Path, out: Path) -> dict[str, Command]:
    tool: Command = [LORA_EXPORT]
    export: Command = ["--precision", "fp16", "--provider", "cuda"]
    return {
        "merge": [*tool, "merge", "-b", base, "-a", adapter, "-o", out / "merged", "-q"],
        "export": [*tool, "export", "-m", base, "-o", out / "base-onnx", *export, "-q"],
        "next": [
            *tool,
            "export",
            "-m",
            out / "merged",
            "-o",
            out / "onnx",
            "--graph-from",
            out / "base-onnx",
            "-q",
        ],
    }


def fit(points: list[tuple[float, float]]) -> dict[str, float]:
    """The line through (bytes of model, bytes of memory) by least squares."""
    from scipy.stats import linregress

    found = linregress([x for x, _ in points], [y for _, y in points])
    return {"bytes_per_byte": float(found.slope), "bytes_at_zero": float(found.intercept)}


def main() -> None:
    options = parse()
    rows: dict[str, Any] = {}
    for size in options.size:
        models: Command = [options.work, size, "bf16", "lora"]
        subprocess.run([sys.executable, HERE / "random_models.py", *models], check=True)
        base, adapter = options.work / size / "bf16", options.work / size / "lora"
        with tempfile.TemporaryDirectory(prefix="bench-memory-", dir=options.work) as scratch:
            rows[size] = {"bytes": sum(p.stat().st_size for p in base.iterdir())}
            for name, command in stages(base, adapter, Path(scratch)).items():
                rows[size][name] = peak_of(command)
                seconds, peak = rows[size][name]["seconds"], rows[size][name]["peak_rss_bytes"]
                print(f"{size} {name}: {seconds:.1f} s, {peak / 1e6:.0f} MB", flush=True)
        if not options.keep:
            remove(options.work / size)
    fits = {
        name: fit([(row["bytes"], row[name]["peak_rss_bytes"]) for row in rows.values()])
        for name in ("merge", "export", "next")
    }
    for name, line in fits.items():
        at = line["bytes_at_zero"] + line["bytes_per_byte"] * options.target
        print(f"{name}: {line['bytes_per_byte']:.4f} bytes a byte of model; {at / 1e9:.1f} GB at 141 GB (70B)")
    document = circumstances(options.work, options.work) | {"sizes": rows, "fits": fits}
    save(options.save, "memory", document)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", default=["0.1B", "1.1B", "3B"])
    work = Path(tempfile.gettempdir(), "lora-export-bench")
    parser.add_argument("--work", type=Path, default=work, help="folder for the models (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep the models for another time")
    parser.add_argument(
        "--target", type=float, default=141e9, help="bytes of model to foretell (default: 70B, bf16)"
    )
    parser.add_argument("--save", type=Path, help="JSON file to write (default: a new one in benchmarks/results)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
