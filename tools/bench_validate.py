"""Peak memory and time of a validation: with the models in memory and streamed, and of a first adapter of a base
beside the next one.

    python tools/bench_validate.py BASE ADAPTER MERGED PROMPTS [MAX_MEMORY …]
    python tools/bench_validate.py --next BASE BASE_ONNX ADAPTER MERGED ONNX ADAPTER MERGED ONNX [TURNS]

Each limit (bytes; 0: no limit) runs in a process of its own. Prints one JSON line for each: seconds, the peak
resident set in MB beyond that of the imports, and the checks.

--next: in each turn a new process validates the first adapter without anything known, the same with an empty folder
to be filled, and the second adapter with what is there then. One JSON line for each, with seconds of the wall and
of the processor by stage, and the peak of the proportional set in MB; at the end the ratio of the last to the
first. All have the same seed, and what is known must change no figure: that is tried with the second adapter, too.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


def peak() -> float:
    """Peak resident set of this process in MB (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def measure(base: Path, adapter: Path, merged: Path, prompts: Path, limit: int) -> None:
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers

    from lora_export.contracts import AdapterChoice
    from lora_export.progress import Silent
    from lora_export.validation import ValidationOptions, validate

    # The lazy part of the libraries.
    transformers.LlamaForCausalLM, transformers.PreTrainedTokenizerFast, transformers.BertModel  # noqa: B018
    imports, start = peak(), time.monotonic()
    options = ValidationOptions(prompts, provider="cpu", max_memory=limit or None)
    result = validate(base, [AdapterChoice(adapter)], merged, options=options, progress=Silent())
    print(
        json.dumps(
            {
                "limit": limit,
                "seconds": round(time.monotonic() - start, 1),
                "imports_mb": round(imports),
                "beyond_imports_mb": round(peak() - imports),
                "passed": result.passed,
                "checks": {c.name: c.value for c in result.checks},
            }
        )
    )


@dataclass
class Stages:
    """Progress that notes what each stage took."""

    wall: dict[str, float] = field(default_factory=dict)
    processor: dict[str, float] = field(default_factory=dict)
    _at: tuple[str, float, float] | None = None

    def stage(self, name: str) -> None:
        now = time.monotonic(), time.process_time()
        if self._at is not None:
            last, wall, processor = self._at
            self.wall[last] = round(self.wall.get(last, 0.0) + now[0] - wall, 2)
            self.processor[last] = round(self.processor.get(last, 0.0) + now[1] - processor, 2)
        self._at = (name, *now)

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


class Watch:
    """The largest proportional set size of this process, looked at ten times a second."""

    def __init__(self) -> None:
        import psutil

        self._process, self.most, self._ends = psutil.Process(), 0.0, threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while not self._ends.wait(0.1):
            self.most = max(self.most, self._process.memory_full_info().pss / 1e6)

    def end(self) -> float:
        self._ends.set()
        return round(self.most)


def one(name: str, base: Path, onnx: Path, row: list[Path], known: Any) -> tuple[dict[str, Any], Any]:
    """(the line of one validation, its result)."""
    from lora_export.contracts import AdapterChoice, ValidationOptions
    from lora_export.onnx_export import load_export
    from lora_export.validation import validate
    from lora_export.workflows.validating import pair_of

    adapter, merged, exported = row
    progress, watch = Stages(), Watch()
    progress.stage("reading")
    result = validate(
        base, [AdapterChoice(adapter)], merged, exports=[pair_of(load_export(exported), onnx)],
        options=ValidationOptions(provider="cpu", seed=7), known=known, progress=progress,
    )  # fmt: skip
    progress.stage("end")
    total = {"wall": round(sum(progress.wall.values()), 1), "processor": round(sum(progress.processor.values()), 1)}
    stages = {"stages_wall": progress.wall, "stages_processor": progress.processor}
    line = {"what": name, **total, "peak_pss_mb": watch.end(), "passed": result.passed, **stages}
    return line, result


def turn(base: Path, onnx: Path, first: list[Path], second: list[Path]) -> None:
    import transformers

    from lora_export.validation import stages  # noqa: F401
    from lora_export.validation.known import KnownBase

    # The lazy part of the libraries.
    transformers.LlamaForCausalLM, transformers.PreTrainedTokenizerFast  # noqa: B018

    with tempfile.TemporaryDirectory() as folder:
        known = KnownBase(Path(folder) / "known", weights=Path(folder) / "weights")
        for name, row, answers in (("first", first, None), ("filling", first, known), ("next", second, known)):
            line, result = one(name, base, onnx, row, answers)
            print(json.dumps(line), flush=True)
    _, fresh = one("fresh", base, onnx, second, None)
    same = _figures(asdict(result)) == _figures(asdict(fresh))
    print(json.dumps({"what": "same figures", "same": same}), flush=True)


def _figures(value: Any) -> Any:
    """Without the notes, one of which says how long a text the memory that is free at the moment allows."""
    if isinstance(value, dict):
        return {name: _figures(part) for name, part in value.items() if name != "note"}
    return [_figures(part) for part in value] if isinstance(value, list | tuple) else value


def next_beside_first(arguments: list[str]) -> None:
    turns = int(arguments.pop()) if len(arguments) % 3 == 0 else 3
    ratios = []
    for _ in range(turns):
        command = [sys.executable, __file__, "--turn", *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        found = {line["what"]: line for line in lines}
        print(*map(json.dumps, lines), sep="\n", flush=True)
        ratios.append({how: found["next"][how] / found["first"][how] for how in ("wall", "processor")})
    medians = {how: round(statistics.median(r[how] for r in ratios), 3) for how in ("wall", "processor")}
    print(json.dumps({"what": "next / first, median", **medians, "turns": turns}))


def main() -> None:
    if sys.argv[1] == "--next":
        next_beside_first(sys.argv[2:])
        return
    if sys.argv[1] == "--turn":
        base, onnx, *rows = (Path(p) for p in sys.argv[2:])
        turn(base, onnx, rows[:3], rows[3:6])
        return
    paths, limits = [Path(p) for p in sys.argv[1:5]], sys.argv[5:] or ["0", "300000000"]
    if len(limits) == 2 and limits[0] == "--one":
        measure(*paths, int(limits[1]))
        return
    for limit in limits:
        subprocess.run([sys.executable, __file__, *map(str, paths), "--one", limit], check=True)


if __name__ == "__main__":
    main()
