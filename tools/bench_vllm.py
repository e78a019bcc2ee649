"""What an adapter costs in vLLM on the CPU: merged, beside served unmerged by `enable_lora`.

    python tools/bench_vllm.py                                   # SmolLM2 and the demo's adapter, compiled
    python tools/bench_vllm.py --eager --minutes 7
    python tools/bench_vllm.py --base BASE --adapter ADAPTER --rounds 20

Five arms: the base, the base again, the merged model, and an engine with LoRA switched on, asked for the base and
for the adapter. Each engine is a process of its own and all live side by side; they are asked in turn, in a random
order within a round. A step is a call of the engine: a prompt read, or a token generated for every row. Ratios are
taken within a round, of medians, to both arms of the base together; intervals as in `lora-export benchmark`.

vLLM does not compile the model on the CPU when LoRA is on (vllm/platforms/cpu.py), whatever it is told. Compiled,
the ratio of the unmerged adapter holds that too; `--eager` compiles none. The base's request in the engine with
LoRA shows what remains for requests that need no adapter.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from processes import HERE, circumstances, save

from lora_export.benchmarking.statistics import log_ratios, ratio_interval
from lora_export.contracts import AdapterChoice
from lora_export.merging import merge

sys.path.insert(0, str(HERE.parent))

ARMS = {  # arm → its engine, and whether it is asked for the adapter
    "base": ("base", False),
    "base again": ("base again", False),
    "merged": ("merged", False),
    "base, LoRA on": ("lora", False),
    "unmerged": ("lora", True),
}
STEPS = {"decode": 16, "prefill": 1}  # steps of a block


@dataclass(frozen=True)
class Cell:
    phase: str
    batch: int


class Engine:
    """A process that answers a line with a line."""

    def __init__(self, settings: dict[str, Any], threads: int) -> None:
        from tests.consumers.vllm_engine import SETTINGS, vllm_python

        environment = os.environ | SETTINGS | {"OMP_NUM_THREADS": str(threads)}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            [vllm_python(), HERE / "vllm_arm.py", json.dumps(settings)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment, cwd=tempfile.gettempdir(),
        )  # fmt: skip
        self.described: dict[str, str] = {}

    def wait(self) -> None:
        """Until it is ready."""
        self.described = self.described or self._read()

    def ask(self, phase: str, batch: int, steps: int, adapter: bool) -> list[Any]:
        assert self._process.stdin is not None
        wanted = {"phase": phase, "batch": batch, "steps": steps, "adapter": adapter}
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()
        return list(self._read())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace")[-4000:]
            raise SystemExit(f"{said}\nan engine ended with {code}")
        return json.loads(line)


def opened(asked: argparse.Namespace, merged: Path) -> dict[str, Engine]:
    folders = {"base": asked.base, "base again": asked.base, "merged": merged, "lora": asked.base}
    rank = json.loads((asked.adapter / "adapter_config.json").read_text())["r"]
    settings = {
        name: {
            "folder": str(folder), "adapter": str(asked.adapter) if name == "lora" else None, "rank": rank,
            "dtype": asked.dtype, "eager": asked.eager, "tokens": asked.tokens, "batch": max(asked.batch),
        }
        for name, folder in folders.items()
    }  # fmt: skip
    # An engine that compiles is slower afterwards than those that find the result in the cache. No arm compiles.
    first = Engine(settings["base"], asked.threads)
    first.wait()
    first.close()
    engines = {name: Engine(given, asked.threads) for name, given in settings.items()}
    for engine in engines.values():
        engine.wait()
    return engines


def agree(engines: dict[str, Engine]) -> None:
    """SystemExit unless every arm is the model that it is called: the adapter changes tokens, merged and unmerged
    alike."""
    said = {arm: engines[name].ask("tokens", 1, 16, adapter) for arm, (name, adapter) in ARMS.items()}
    if not said["base"] == said["base again"] == said["base, LoRA on"] != said["merged"] == said["unmerged"]:
        raise SystemExit(f"the arms are not the models that they are called: {said}")


def measured(
    engines: dict[str, Engine], cells: Sequence[Cell], rounds: int, seconds: float
) -> dict[Cell, dict[str, list[list[float]]]]:
    """Blocks of seconds of each arm, in every cell; one round is not kept."""
    order, taken = random.Random(0), {c: {a: [] for a in ARMS} for c in cells}
    until = time.monotonic() + seconds
    for at in range(rounds + 1):
        for cell in cells:
            for arm in order.sample(list(ARMS), len(ARMS)):
                name, adapter = ARMS[arm]
                block = engines[name].ask(cell.phase, cell.batch, STEPS[cell.phase], adapter)
                if at:
                    taken[cell][arm].append(block)
        print(f"round {at} of {rounds}", file=sys.stderr, flush=True)
        if at > 1 and time.monotonic() > until:
            break
    return taken


def judged(taken: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Of one cell: the median step of each arm in milliseconds, and its ratio to both bases with an interval."""
    times = {arm: np.array(blocks) for arm, blocks in taken.items()}
    rng, found = np.random.default_rng(0), {}
    for arm, blocks in times.items():
        references = [times["base"]] if arm == "base again" else [times["base"], times["base again"]]
        found[arm] = {"step_ms": float(np.median(blocks) * 1000)}
        if arm != "base":
            of = ratio_interval(log_ratios(blocks, *references), rng)
            found[arm] |= {"ratio": of.ratio, "ci_low": of.low, "ci_high": of.high}
    return found


def main() -> None:
    asked = parse()
    cells = [Cell(phase, batch) for phase in asked.phase for batch in asked.batch]
    with tempfile.TemporaryDirectory(prefix="bench-vllm-", dir=asked.work) as scratch:
        merged = merge(asked.base, [AdapterChoice(asked.adapter)], Path(scratch) / "merged").output
        engines = opened(asked, merged)
        try:
            if asked.dtype == "float32":  # in 16 bits, rounding alone can choose another token
                agree(engines)
            taken = measured(engines, cells, asked.rounds, 60 * asked.minutes)
        finally:
            for engine in engines.values():
                engine.close()
    results = []
    for cell, arms in taken.items():
        results.append({**asdict(cell), "rounds": len(arms["base"]), "arms": judged(arms), "seconds": arms})
        ratios = ", ".join(f"{a} {v['ratio']:.3f}" for a, v in results[-1]["arms"].items() if "ratio" in v)
        print(f"{cell.phase}, batch {cell.batch}: {ratios}", flush=True)
    mode = "eager" if asked.eager else "compiled"
    document = circumstances(asked.work, asked.work) | {
        "vllm": engines["base"].described["version"], "mode": mode, "dtype": asked.dtype, "threads": asked.threads,
        "prompt_tokens": asked.tokens, "base": asked.base.name, "adapter": asked.adapter.name,
        "compilation": {name: e.described["compilation"] for name, e in engines.items()}, "cells": results,
    }  # fmt: skip
    save(asked.save, f"vllm-{mode}", document)


def parse() -> argparse.Namespace:
    cache = Path(os.environ.get("LORA_EXPORT_CACHE", HERE.parent / ".cache"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=cache / "SmolLM2-135M-Instruct", help="default: %(default)s")
    adapter = HERE.parent / "examples" / "adapters" / "lora-speeches"
    parser.add_argument("--adapter", type=Path, default=adapter, help="a LoRA; default: %(default)s")
    parser.add_argument("--eager", action="store_true", help="compile none of the engines")
    parser.add_argument("--dtype", default="float32", help="that the engines compute in; default: %(default)s")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--phase", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--tokens", type=int, default=256, help="of a prompt that is read; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="of each engine; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=30, help="at most; default: %(default)s")
    parser.add_argument("--minutes", type=float, default=15, help="after which no round begins")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="default: %(default)s")
    parser.add_argument("--save", type=Path, help="JSON file to write (default: a new one in benchmarks/results)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
