"""Our graph of an encoder beside Optimum's, fused by its O2: nodes, and latency in one process.

    python -m venv /tmp/optimum && /tmp/optimum/bin/pip install optimum-onnx==0.1.0 onnxruntime transformers==4.57.3
    python tools/bench_encoder.py --optimum /tmp/optimum/bin/optimum-cli

Optimum's exporter needs another transformers than ours, and so an environment of its own. Both graphs then run in
this environment's ONNX Runtime, in turn, by `lora-export benchmark`: `ratio` is our time over Optimum's.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from processes import LORA_EXPORT, circumstances, save

from lora_export.onnx_export.graphs.checks import count_nodes

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SHAPES = ((1, 16), (1, 128), (8, 128))  # batch, tokens


def minilm() -> Path:
    command = [sys.executable, EXAMPLES / "prepare_smollm2.py", "--minilm"]
    return Path(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip())


def latency(ours: Path, theirs: Path, output: Path, seconds: float) -> dict[str, Any]:
    command = [LORA_EXPORT, "benchmark", "-m", ours, "-b", theirs, "-o", output, "--provider", "cpu"]
    command += ["--max-time", str(seconds), "-q"]
    for name, values in (("--batch", {b for b, _ in SHAPES}), ("--prompt-length", {n for _, n in SHAPES})):
        for value in sorted(values):
            command += [name, str(value)]
    done = subprocess.run(command, check=False, stdout=sys.stderr)
    folder = output if done.returncode == 0 else output.with_name(f"{output.name}.failed")
    if done.returncode not in (0, 3):  # 3: ours is slower, which is a result here
        raise SystemExit(f"lora-export benchmark ended with {done.returncode}")
    return dict(json.loads((folder / "report.json").read_text(encoding="utf-8"))["benchmark"])


def main() -> None:
    options = parse()
    model = options.model or minilm()
    with tempfile.TemporaryDirectory(prefix="bench-encoder-") as scratch:
        ours, theirs = Path(scratch, "ours"), Path(scratch, "optimum")
        subprocess.run([LORA_EXPORT, "export", "-m", model, "-o", ours, "-q"], check=True, stdout=sys.stderr)
        command = [options.optimum, "export", "onnx", "--model", model, "--task", "feature-extraction"]
        subprocess.run([*command, "--optimize", "O2", theirs], check=True, stdout=sys.stderr)
        graphs = {"ours": ours / "model.onnx", "optimum": theirs / "model.onnx"}
        nodes = {name: count_nodes(path) for name, path in graphs.items()}
        measured = latency(graphs["ours"], graphs["optimum"], Path(scratch, "latency"), options.seconds)
        around = circumstances(Path(scratch), Path(scratch))
    versions = subprocess.run(
        [options.optimum.with_name("pip"), "freeze"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.split()
    wanted = ("optimum", "onnx", "transformers", "torch")
    theirs_versions = {n: v for n, _, v in (line.partition("==") for line in versions) if n.startswith(wanted)}
    print(f"nodes as written: {nodes['ours']} ours, {nodes['optimum']} Optimum's O2")
    for cell in measured["cells"]:
        print(
            f"batch {cell['batch']}, {cell['prompt']} tokens: {cell['merged_ms']:.2f} ms ours, "
            f"{cell['base_ms']:.2f} ms Optimum's, ratio {cell['ratio']:.3f} "
            f"({cell['ci_low']:.3f} to {cell['ci_high']:.3f})"
        )
    document = {"model": model.resolve().name, "nodes": nodes, "optimum": theirs_versions, "benchmark": measured}
    save(options.save, f"encoder-{model.resolve().name}", around | document)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimum", type=Path, required=True, metavar="OPTIMUM_CLI", help="of another environment")
    parser.add_argument("--model", type=Path, help="another BERT than all-MiniLM-L6-v2")
    parser.add_argument("--seconds", type=float, default=60, help="of measuring (default: %(default)s)")
    parser.add_argument("--save", type=Path, help="JSON file to write (default: a new one in benchmarks/results)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
