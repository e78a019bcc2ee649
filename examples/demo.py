"""The whole story on a real model: SmolLM2-135M and an adapter that was trained on presidents' messages.

    python examples/demo.py --adapter lora-speeches --out demo-output
    python examples/demo.py --int4 --out demo-output-int4

Prepares the model once, runs `lora-export merge-and-export`, and shows a text before and after. A run that is
there already is shown again and not repeated; delete the folder, or give --again, to repeat it. With --int4, the
weights are calibrated on messages that the adapter was trained on, and judged on others.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import prepare_smollm2

ADAPTERS = Path(__file__).parent / "adapters"
# What training did to the base. An adapter's files do not tell, so a person has to (see the adapters' cards).
TRAINED_WITH = {
    "lora-speeches": [],
    "qlora-speeches": ["--training-quantization", "nf4", "--training-double-quant"],
}
PROMPTS = Path(__file__).parent / "prompts.txt"
CHARACTERS = 5000  # of each message that is read


def run_story(base: Path, adapter: str, out: Path, extra: list[str]) -> int:
    """Run the command that a user would type, and print it first."""
    command = ["lora-export", "merge-and-export", "-b", str(base), "-a", str(ADAPTERS / adapter), "-o", str(out)]
    command += [*TRAINED_WITH[adapter], "--prompts", str(PROMPTS), "--force", *extra]
    print("$ " + " ".join(command), file=sys.stderr)
    executable = Path(sys.executable).with_name("lora-export")
    return subprocess.run([str(executable), *command[1:]], check=False).returncode


def int4(folder: Path) -> list[str]:
    """Options for an int4 export that keeps the adapter; the texts for it are written into `folder`.

    Every tenth message is held out, as in training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    messages = sorted(prepare_smollm2.speeches().glob("18*.txt"))
    held_out = messages[9::10]
    options = ["--precision", "int4", "--quantizer", "gptq"]
    trained_on = [m for m in messages if m not in held_out][::6]
    for flag, name, some in (("--calibration", "calibration", trained_on), ("--text", "held-out", held_out[::3])):
        path = folder / f"{name}.txt"
        texts = (m.read_text(encoding="utf-8")[CHARACTERS : 2 * CHARACTERS] for m in some)
        path.write_text("\n".join(" ".join(t.split()) for t in texts) + "\n", encoding="utf-8")
        options += [flag, str(path)]
    return options


def show(out: Path) -> None:
    """A text before and after, and the verdicts, from the run's own report."""
    report = json.loads((out / "report" / "report.json").read_text(encoding="utf-8"))
    print("\n" + ending(report, out))


def ending(report: dict[str, Any], out: Path) -> str:
    sample = report["validate"]["samples"][0]
    checks = {c["name"]: c for c in report["validate"]["checks"]}
    cell = report["benchmark"]["cells"][-1]
    rows = [
        ("gates", report["status"]),
        ("logits, merged against unmerged", f"{checks['logits_max_abs']['value']:.2g} at most"),
        ("  noise floor of rounding alone", f"{checks['noise_floor_max_abs']['value']:.2g}"),
        ("logits, ONNX against unmerged", f"{checks['onnx_logits_max_abs']['value']:.2g} at most"),
        ("greedy tokens equal", f"{checks['onnx_greedy_agreement']['value']:.0%}"),
        ("tensors beyond one rounding", f"{checks['tensor_errors']['value']:.0f}"),
        ("base and merged graphs", "identical" if report["benchmark"]["graph_identical"] else "differ"),
        (f"{cell['phase']} latency, merged/base", f"{cell['ratio']:.3f} ({said(cell)})"),
        ("provider", report["benchmark"]["provider"]),
        ("report", str(out / "report" / "report.html")),
    ]
    width = max(len(name) for name, _ in rows)
    texts = [f"{name:<10}{' '.join(sample[name].split())}" for name in ("prompt", "base", "merged")]
    return "\n".join([*texts, "", *(f"{name:<{width}}  {value}" for name, value in rows)])


def said(cell: dict[str, Any]) -> str:
    """The verdict in words, and the interval of what was measured."""
    return f"{cell['verdict'].replace('_', ' ')}, {cell['ci_low']:.3f} to {cell['ci_high']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--adapter", choices=sorted(TRAINED_WITH), default="lora-speeches")
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    parser.add_argument("--int4", action="store_true", help="export int4 with gptq")
    parser.add_argument("--again", action="store_true", help="run even if OUT is there")
    parser.add_argument("extra", nargs="*", help="further options for lora-export, after --")
    args = parser.parse_args()
    if args.again or not (args.out / "manifest.json").is_file():
        precision = int4(prepare_smollm2.default_cache() / "int4-texts") if args.int4 else []
        code = run_story(prepare_smollm2.model(), args.adapter, args.out, [*precision, *args.extra])
        if code:
            raise SystemExit(code)
    else:
        print(f"{args.out} is there already; its results (delete it to run again):", file=sys.stderr)
    show(args.out)


if __name__ == "__main__":
    main()
