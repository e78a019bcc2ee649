"""What it costs to put another adapter into a merged folder, into an export, and into a session that serves.

    python tools/bench_switch.py --base BASE --first ADAPTER --second ADAPTER

On disk: `switch` there and back, beside a fresh merge of the same adapter, or a fresh export with the same graph,
into a folder of its own. Live: each way of `lora_export.serving` beside a plain session, in turn: what a switch
takes, and what a decoding step takes.
"""

import argparse
import itertools
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from processes import circumstances, save, spread

from lora_export.contracts import AdapterChoice, ExportOptions
from lora_export.merging import merge
from lora_export.onnx_export import export, reweight
from lora_export.progress import Silent
from lora_export.serving import Plugged, Swapped
from lora_export.workflows.pluggable import export_pluggable
from lora_export.workflows.switching import switch

PAST = 128  # tokens in the cache of the decoding step


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


def on_disk(
    folder: Path, base: Path, states: list[list[AdapterChoice]], rounds: int, fresh: Callable[[int, Path], Any]
) -> dict[str, Any]:
    """Seconds of switches there and back, and their ratios to `fresh`, which makes a state in a new folder."""
    samples, steps = [], itertools.pairwise(itertools.cycle((0, 1)))
    for _ in range(2 * rounds):
        before, after = next(steps)
        aside = folder.with_name("fresh")
        seconds = timed(lambda to=after, at=aside: fresh(to, at))[0]  # type: ignore[misc]
        shutil.rmtree(aside)
        found = switch(folder, base, states[before], states[after], Silent())
        samples.append({"seconds": found.seconds, "fresh_seconds": seconds})
    return {"to_fresh": spread([s["seconds"] / s["fresh_seconds"] for s in samples]), "samples": samples}


def step(session: Any) -> dict[str, Any]:
    """Inputs of one decoding step."""
    import numpy as np

    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
    found = {}
    for i in session.get_inputs():
        if "past" in i.name:
            shape = [1 if d == "batch_size" else PAST if isinstance(d, str) else d for d in i.shape]
            found[i.name] = np.zeros(shape, types[i.type])
        else:
            found[i.name] = np.ones((1, PAST + 1 if "mask" in i.name else 1), types[i.type])
    return found


def live(plain: Path, other: Path, plugged: Path | None, repeat: int) -> dict[str, Any]:
    """Medians of a decoding step, in turn with a plain session's, and of a switch there and back."""
    import onnxruntime

    # The session that a process opens first is slower than others, for as long as it is open.
    graph, providers = str(plain / "model.onnx"), ["CPUExecutionProvider"]
    unmeasured = onnxruntime.InferenceSession(graph, providers=providers)
    base = onnxruntime.InferenceSession(graph, providers=unmeasured.get_providers())
    swapped = Swapped(plain, "cpu")
    feeds = step(base)
    runs: dict[str, Callable[[], Any]] = {
        "plain": lambda: base.run(None, feeds),
        "swapped": lambda: swapped.run(None, feeds),
    }
    switches: dict[str, Callable[[Path], Any]] = {"swapped": swapped.switch}
    if plugged is not None:
        session = Plugged(plugged, "cpu")
        (adapter,) = session.adapters
        runs["plugged"] = lambda: session.run(None, feeds, adapter)
        switches["plugged"] = lambda _: session.add("again", plugged / f"{adapter}.onnx_adapter")
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(0)
    for at in range(repeat + 3):
        for name, run in order.sample(list(runs.items()), len(runs)):
            seconds = timed(run)[0]
            if at >= 3:
                times[name].append(1000 * seconds)
    changes = {
        name: spread([1000 * timed(partial(change, folder))[0] for folder in (other, plain) * 5])
        for name, change in switches.items()
    }
    reopened = [
        1000
        * timed(lambda: onnxruntime.InferenceSession(str(other / "model.onnx"), providers=base.get_providers()))[0]
        for _ in range(3)
    ]
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "step_ms": {name: spread(values) for name, values in times.items()},
        "step_ratio": {name: value / medians["plain"] for name, value in medians.items()},
        "switch_ms": changes | {"reopened": spread(reopened)},
    }


def main() -> None:
    options = parse()
    base, progress = options.base, Silent()
    states = [[AdapterChoice(a)] for a in (options.first, options.second)]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bench-switch-", dir=options.work) as scratch:
        work = Path(scratch)
        merged = [merge(base, s, work / f"merged-{i}").output for i, s in enumerate(states)]
        results["merged"] = on_disk(
            Path(shutil.copytree(merged[0], work / "x")), base, states, options.rounds,
            lambda to, at: merge(base, states[to], at),
        )  # fmt: skip
        _say("merged", results["merged"])
        for precision in options.precision:
            graph = export(base, work / f"base-{precision}", ExportOptions(precision, "cpu"), progress=progress)
            pair = [
                reweight(graph.output, m, work / f"{precision}-{i}", progress=progress).output
                for i, m in enumerate(merged)
            ]
            plugged = None
            if precision != "int4":
                plugged = work / f"plugged-{precision}"
                export_pluggable(base, [options.first], plugged, ExportOptions(precision, "cpu"), progress)
            found = {"live": live(*pair, plugged, options.repeat)}
            folder = Path(shutil.copytree(pair[0], work / f"x-{precision}"))
            found |= on_disk(
                folder, base, states, options.rounds,
                lambda to, at, earlier=graph.output: reweight(
                    earlier, merge(base, states[to], at / "merged").output, at / "onnx", progress=progress
                ),
            )  # fmt: skip
            results[precision] = found
            _say(precision, found)
            print(f"  live: step {found['live']['step_ratio']}, switch {found['live']['switch_ms']}", flush=True)
            for path in work.glob(f"*{precision}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    names = {"base": base.name, "first": options.first.name, "second": options.second.name}
    save(options.save, "switch", circumstances(options.work, options.work) | names | {"results": results})


def _say(name: str, found: dict[str, Any]) -> None:
    ratio = found["to_fresh"]
    print(
        f"{name}: a switch takes {ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f}) of a fresh one",
        flush=True,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--first", type=Path, required=True)
    parser.add_argument("--second", type=Path, required=True)
    parser.add_argument(
        "--precision", nargs="*", choices=["fp32", "fp16", "int4"], default=["fp32", "fp16", "int4"]
    )
    parser.add_argument("--rounds", type=int, default=3, help="times there and back")
    parser.add_argument("--repeat", type=int, default=30, help="decoding steps of each session")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="default: %(default)s")
    parser.add_argument("--save", type=Path, help="JSON file to write (default: a new one in benchmarks/results)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
