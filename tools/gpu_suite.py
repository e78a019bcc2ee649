"""Everything that proves the latency of a merged model, on one machine, without a network and in one command.

    PYTHONPATH=$PWD python tools/gpu_suite.py --out RESULTS                     # 1.1B; fp16 and int4 on CUDA
    PYTHONPATH=$PWD python tools/gpu_suite.py --out RESULTS --size 7B --precision fp16
    PYTHONPATH=$PWD python tools/gpu_suite.py --out RESULTS --size 0.1B         # on a CPU: fp32 and int4

Builds a Llama-shaped base and a LoRA on all linear layers from a seed, merges, exports the base, the merged and
the unmerged model and one with the adapter to plug in, and measures them side by side with and without CUDA
graphs, in each precision. What is made lies in --work and is used again: the same command, run again, goes on
where it stopped. RESULTS gets a report for each precision with every raw sample, and suite.json: machine,
versions, times of the steps.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from processes import HERE, circumstances
from random_models import SHAPES

from lora_export.runtime import resolve_provider
from lora_export.storage.sealed import write_json

# Import name → what pip calls it. A GPU machine without a network has to be brought what it lacks.
NEEDED = {
    "blake3": "blake3", "click": "click", "filelock": "filelock", "huggingface_hub": "huggingface-hub",
    "jinja2": "jinja2", "matplotlib": "matplotlib", "numpy": "numpy", "onnx": "onnx", "onnx_ir": "onnx-ir",
    "onnxruntime": "onnxruntime-gpu", "onnxruntime_genai": "onnxruntime-genai-cuda", "onnxscript": "onnxscript",
    "peft": "peft", "psutil": "psutil", "pynvml": "nvidia-ml-py", "rich": "rich", "safetensors": "safetensors",
    "scipy": "scipy", "tokenizers": "tokenizers", "torch": "torch", "transformers": "transformers",
}  # fmt: skip


def main() -> None:
    options = parse()
    refuse_missing()
    provider = resolve_provider(options.provider)
    size = options.size or ("1.1B" if provider != "cpu" else "0.1B")
    precisions = options.precision or (["fp16", "int4"] if provider != "cpu" else ["fp32", "int4"])
    options.out.mkdir(parents=True, exist_ok=True)
    suite = Suite(options, provider, size)
    suite.build()
    for precision in precisions:
        suite.measure(precision)
    suite.show(precisions)


class Suite:
    """Steps that are done are in suite.json with their seconds; what they made is there, or they are done again."""

    def __init__(self, options: argparse.Namespace, provider: str, size: str) -> None:
        self.options, self.provider, self.size = options, provider, size
        self.models = options.work / size
        self.record = options.out / "suite.json"
        known = json.loads(self.record.read_text(encoding="utf-8")) if self.record.is_file() else {}
        self.seconds: dict[str, float] = known.get("seconds", {})
        self.save()

    def save(self) -> None:
        machine = circumstances(self.options.work, self.options.out)
        write_json(self.record, {"size": self.size, "provider": self.provider, **machine, "seconds": self.seconds})

    def step(self, name: str, makes: Path, *command: str | Path) -> None:
        """Run a command unless what it makes is there. Outputs of this project are there whole, or not at all."""
        if makes.exists():
            print(f"{name}: there already", flush=True)
            return
        print(f"{name} …", end=" ", flush=True)
        started = time.monotonic()
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
        if done.returncode not in (0, 3):  # 3: found slower, which is a result
            sys.exit(f"failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        self.seconds[name] = round(time.monotonic() - started, 1)
        print(f"{self.seconds[name]:.1f} s", flush=True)
        self.save()

    def build(self) -> None:
        base, adapter, merged = (self.models / name for name in ("bf16", "lora", "merged"))
        self.step(
            "base and adapter", adapter, HERE / "random_models.py", self.options.work, self.size, "bf16", "lora"
        )
        command = ("merge", "-b", base, "-a", adapter, "-o", merged, "-q")
        self.step("merge", merged, "-m", "lora_export", *command)

    def measure(self, precision: str) -> None:
        arms = self.export(precision)
        report = self.options.out / f"latency-{precision}"
        failed = report.with_name(f"{report.name}.failed")
        if failed.is_dir():
            print(f"measure {precision}: there already", flush=True)
            return
        words = ["benchmark", "-b", arms["base"], "-m", arms["merged"], "-u", arms["unmerged"], "-o", report, "-q"]
        if "plugged" in arms:
            words += ["--plugged", arms["plugged"]]
        if self.options.pytorch:
            words += ["--pytorch", self.models / "bf16", self.models / "lora"]
        if "unfused" in arms:
            words += ["--beside", f"unfused={arms['unfused']}"]
        for pair in self.options.beside:
            words += ["--beside", pair]
        words += ["--grid", self.options.grid or ("paper" if self.provider != "cpu" else "quick")]
        words += ["--provider", self.provider, "--max-time", self.options.max_time, "--margin", self.options.margin]
        self.step(f"measure {precision}", report, "-m", "lora_export", *words)

    def export(self, precision: str) -> dict[str, Path]:
        """The folders of all arms in one precision; the merged model takes the graph of the base."""
        folder = self.models / f"{precision}-{self.provider}"
        base, adapter, merged = (self.models / name for name in ("bf16", "lora", "merged"))
        how = ("--precision", precision, "--provider", self.provider, "-q")
        made = {
            "base": ("-m", base, *how),
            "merged": ("-m", merged, "--graph-from", folder / "base", "-q"),
            "unmerged": ("-m", base, "-a", adapter, "--unmerged", *how),
        }
        if precision in ("fp32", "fp16", "bf16"):
            made["plugged"] = ("-m", base, "-a", adapter, *how)
        if self.options.unfused:
            made["unfused"] = ("-m", merged, "--engine", "dynamo", "--optimize", "none", *how)
        for name, words in made.items():
            command = ("-m", "lora_export", "export", *words, "-o", folder / name)
            self.step(f"export {name} {precision}", folder / name, *command)
        return {name: folder / name for name in made}

    def show(self, precisions: list[str]) -> None:
        for precision in precisions:
            print(f"\n{self.size} {precision} on {self.provider}")
            for line in lines(self.options.out, precision):
                print(line)
        print(f"\nall of it: {self.options.out}, {sum(self.seconds.values()):.0f} s of work")


def lines(out: Path, precision: str) -> list[str]:
    """A line for each cell and arm of a report."""
    folder = next(p for p in (out / f"latency-{precision}", out / f"latency-{precision}.failed") if p.is_dir())
    bench = json.loads((folder / "report.json").read_text(encoding="utf-8"))["benchmark"]
    found = [f"  graphs identical: {bench['graph_identical']}; provider verified: {bench['provider_verified']}; "
             f"verdict: {bench['verdict']}"]  # fmt: skip
    for cell in bench["cells"]:
        graph = ", CUDA graph" if cell["cuda_graph"] else ""
        found.append(f"  {cell['phase']} b{cell['batch']} s{cell['prompt']}{graph}: {cell['verdict']}")
        found += [_arm(name, arm) for name, arm in cell["arms"].items()]
    return found


def _arm(name: str, arm: dict[str, Any]) -> str:
    ratio = f"  {arm['ratio']:.4f} [{arm['ci_low']:.4f}, {arm['ci_high']:.4f}]" if arm["ratio"] else ""
    return f"    {name:<10} {arm['p50']['ms']:9.3f} ms{ratio}"


def refuse_missing() -> None:
    """SystemExit that names every package that is not here, all at once."""
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        sys.exit(f"not installed here: {' '.join(missing)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=HERE.parent / "benchmarks" / "results" / f"suite-{datetime.now():%Y-%m-%d}")
    add("--work", type=Path, default=Path("/tmp/gpu-suite"), help="models are kept here and used again")
    add("--size", choices=SHAPES, help="default: 1.1B, and 0.1B on a CPU")
    add("--precision", nargs="+", help="default: fp16 and int4; fp32 and int4 on a CPU")
    add("--provider", default="auto")
    add("--grid", help="default: paper, and quick on a CPU")
    add("--max-time", default="90s", help="for the measurement of one precision")
    add("--margin", default="1%")
    add("--pytorch", action="store_true", help="measure PEFT's unmerged model under PyTorch, too")
    add(
        "--unfused",
        action="store_true",
        help="measure the plain graph of torch.onnx, too; it takes minutes to export",
    )
    add("--beside", action="append", default=[], metavar="NAME=ONNX", help="another graph of the merged model")
    return parser.parse_args()


if __name__ == "__main__":
    main()
