"""The same graphs in OpenVINO and in ONNX Runtime, on this CPU: base, base again and merged, prefill and decode.

    LORA_EXPORT_CACHE=… python tools/bench_openvino.py --base BASE --run RUN            # of merge-and-export

OpenVINO has an environment of its own (tests/consumers/environments.py), so each runtime is a process. They take
turns: a block is a few calls of every arm, in a drawn order, while the other process waits. Both compute in fp32,
with as many threads. A ratio is of medians within a block; its interval is the benchmark's own.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from processes import LORA_EXPORT, circumstances, save

from lora_export.benchmarking.statistics import log_ratios, ratio_interval

WORKER = Path(__file__).with_name("graph_worker.py")
RUNTIMES = ("onnxruntime", "openvino")
PHASES = {"prefill of 128": (1, 128, 0), "decode behind 128": (1, 1, 128)}  # rows, tokens, tokens before
ARMS = ("base", "again", "merged")
RATIOS = (
    ("openvino merged", "onnxruntime merged"), ("openvino base", "onnxruntime base"),
    ("openvino merged", "openvino base"), ("openvino again", "openvino base"),
    ("onnxruntime merged", "onnxruntime base"), ("onnxruntime again", "onnxruntime base"),
)  # fmt: skip
CLOSE = 1e-2  # of logits, in fp32: more, and the two do not compute the same


class Worker:
    """One runtime with its graphs, in a process that waits for requests."""

    def __init__(self, interpreter: Path, runtime: str, threads: int, graphs: Mapping[str, Path]) -> None:
        arms = [f"{name}={path}" for name, path in graphs.items()]
        command = [interpreter, WORKER, runtime, str(threads), *arms]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a runtime ended with {self._process.wait()}")
        return dict(json.loads(line))

    def ask(self, **asked: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measured(workers: Mapping[str, Worker], shape: tuple[int, int, int], blocks: int, calls: int) -> dict[str, Any]:
    """Milliseconds of every call of every arm, the ratios, and how far the runtimes' logits lie apart."""
    asked = dict(zip(("rows", "tokens", "past"), shape, strict=True))
    arms = [(runtime, arm) for runtime in workers for arm in ARMS]
    first = {at: workers[at[0]].ask(arm=at[1], calls=2, **asked)["logits"] for at in arms}  # warms up, too
    apart = {
        arm: float(np.abs(np.subtract(first["openvino", arm], first["onnxruntime", arm])).max()) for arm in ARMS
    }
    if max(apart.values()) > CLOSE:
        raise SystemExit(f"the runtimes compute different logits: {apart}")
    order = random.Random(0)
    samples: dict[str, list[list[float]]] = {" ".join(at): [] for at in arms}
    for block in range(blocks):
        for runtime, arm in order.sample(arms, len(arms)):
            # The first call after the other process ran is not counted.
            seconds = workers[runtime].ask(arm=arm, calls=calls + 1, **asked)["seconds"][1:]
            samples[f"{runtime} {arm}"].append([1000 * s for s in seconds])
        print(f"  block {block + 1} of {blocks}", file=sys.stderr)
    times = {name: np.array(values) for name, values in samples.items()}
    rng = np.random.default_rng(0)
    ratios = {}
    for arm, reference in RATIOS:
        found = ratio_interval(log_ratios(times[arm], times[reference]), rng)
        ratios[f"{arm} / {reference}"] = {"ratio": found.ratio, "ci_low": found.low, "ci_high": found.high}
    medians = {name: float(np.median(values)) for name, values in times.items()}
    return {"shape": asked, "logits_apart": apart, "median_ms": medians, "ratios": ratios, "samples_ms": samples}


def main() -> None:
    from tests.consumers.environments import installed, version

    options = parse()
    interpreter = installed("openvino", ("openvino==2026.4.1",))
    results = {}
    with tempfile.TemporaryDirectory(prefix="bench-openvino-", dir=options.work) as scratch:
        base = options.exported or Path(scratch, "base")
        if options.exported is None:
            command = [LORA_EXPORT, "export", "-m", options.base, "-o", base, "--precision", "fp32", "-q"]
            subprocess.run([*command, "--provider", "cpu"], check=True, stdout=sys.stderr)
        merged = options.run / "onnx" / "model.onnx"
        graphs = {"base": base / "model.onnx", "again": base / "model.onnx", "merged": merged}
        pythons = {"onnxruntime": Path(sys.executable), "openvino": interpreter}
        workers = {name: Worker(pythons[name], name, options.threads, graphs) for name in RUNTIMES}
        try:
            for phase, shape in PHASES.items():
                results[phase] = measured(workers, shape, options.blocks, options.calls)
                for name, found in results[phase]["ratios"].items():
                    print(
                        f"{phase}, {name}: {found['ratio']:.3f} ({found['ci_low']:.3f} to {found['ci_high']:.3f})"
                    )
        finally:
            for worker in workers.values():
                worker.close()
    around = circumstances(options.work, options.work)
    around["versions"]["openvino"] = version(interpreter, "openvino")
    how = {"model": options.name, "threads": options.threads, "blocks": options.blocks, "calls": options.calls}
    save(options.save, f"openvino-{options.name}", around | how | {"phases": results})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bases = parser.add_mutually_exclusive_group(required=True)
    bases.add_argument("--base", type=Path, help="model folder, exported first")
    bases.add_argument("--exported", type=Path, help="the base's export in fp32, if there is one")
    parser.add_argument("--run", type=Path, required=True, help="of merge-and-export, in fp32, of a decoder")
    parser.add_argument("--name", default="SmolLM2-135M", help="of the model (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--calls", type=int, default=5, help="of each arm in a block (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each runtime (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="default: %(default)s")
    parser.add_argument("--save", type=Path, help="JSON file to write (default: a new one in benchmarks/results)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
