"""Go on training after a merge: a merged folder is a base like any other.

    python examples/continue_training.py --out continued            # ten minutes on two CPU cores
    python examples/continue_training.py --out continued --short    # two minutes, to see that it runs

The messages of 1800 to 1849 are learnt first, by LoRA 1; then come those of 1850 to 1899, with a quarter of the old
ones mixed in, so that they are not forgotten. Three ways are compared on held-out messages of both halves:

* LoRA 2 on the folder into which `lora-export merge` put LoRA 1 (and it is merged as well);
* LoRA 1 trained further;
* a fresh LoRA on the base, which has seen nothing of the first part.
"""

import argparse
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prepare_smollm2
import torch
import train_adapter
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoTokenizer

SPLIT = "1850"
OLD_SHARE = 0.25  # of the second part's windows are of the first part


def halves(speeches: Path, base: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """For the messages before SPLIT and from then on: token ids to train on, and of every tenth message."""
    tokenizer = AutoTokenizer.from_pretrained(base)

    def encode(files: list[Path]) -> Tensor:
        texts = [file.read_text(encoding="utf-8") for file in files]
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor([token for text in ids for token in text])

    files = sorted(speeches.glob("18*.txt"))
    parts = [f for f in files if f.name < SPLIT], [f for f in files if f.name >= SPLIT]
    first, second = ((encode([f for i, f in enumerate(p) if i % 10 != 9]), encode(p[9::10])) for p in parts)
    return first, second


def mixed(new: Tensor, old: Tensor, args: argparse.Namespace) -> train_adapter.Sampler:
    """Windows of the new text, and of the old one now and then."""
    samplers = train_adapter.anywhere(new, args), train_adapter.anywhere(old, args)
    draw = random.Random(args.seed)

    def batch() -> Tensor:
        fresh, past = (sample() for sample in samplers)
        return torch.stack([p if draw.random() < OLD_SHARE else n for n, p in zip(fresh, past, strict=True)])

    return batch


def merge(base: Path, adapter: Path, out: Path) -> Path:
    """What a user types: lora-export merge."""
    command = [sys.executable, "-m", "lora_export", "merge", "-b", base, "-a", adapter, "-o", out, "--force", "-q"]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    return out


class Study:
    """The held-out windows of both halves, and what was measured on them."""

    def __init__(self, held_out: tuple[Tensor, Tensor], args: argparse.Namespace, count: int) -> None:
        self.windows = [train_adapter.spread(tokens, count, args.sequence) for tokens in held_out]
        self.args, self.curves = args, dict[str, list[tuple[int, float, float]]]()

    def look(self, name: str, model: torch.nn.Module, start: int) -> Callable[[int], None]:
        """A watcher that keeps (step, perplexity on the first half, on the second)."""

        def watch(step: int) -> None:
            first, second = (train_adapter.perplexity(model, w, self.args.batch) for w in self.windows)
            self.curves.setdefault(name, []).append((start + step, round(first, 3), round(second, 3)))
            print(f"{name}, step {start + step}: {first:.2f} on 1800-1849, {second:.2f} on 1850-1899", flush=True)

        return watch

    def train(self, name: str, model: PeftModel, sample: train_adapter.Sampler, start: int) -> PeftModel:
        watch = self.look(name, model, start)
        watch(0)
        train_adapter.train(model, sample, self.args, watch)
        return model


def run(base: Path, args: argparse.Namespace, out: Path, count: int) -> dict[str, Any]:
    (first, first_held), (second, second_held) = halves(prepare_smollm2.speeches(), base)
    study = Study((first_held, second_held), args, count)
    steps = args.steps

    torch.manual_seed(args.seed)
    one = get_peft_model(train_adapter.load_base(base, "lora"), train_adapter.adapter_config(args))
    study.train("LoRA 1", one, train_adapter.anywhere(first, args), 0)
    one.save_pretrained(out / "lora-1", save_embedding_layers=False)
    merged = merge(base, out / "lora-1", out / "merged-1")

    two = get_peft_model(train_adapter.load_base(merged, "lora"), train_adapter.adapter_config(args))
    study.train("LoRA 2 on the merged folder", two, mixed(second, first, args), steps)
    two.save_pretrained(out / "lora-2", save_embedding_layers=False)
    both = train_adapter.load_base(merge(merged, out / "lora-2", out / "merged-2"), "lora")
    study.look("both merged", both, 2 * steps)(0)
    del two, both

    study.train("LoRA 1 trained further", one, mixed(second, first, args), steps)
    del one
    fresh = get_peft_model(train_adapter.load_base(base, "lora"), train_adapter.adapter_config(args))
    study.train("a fresh LoRA", fresh, mixed(second, first, args), steps)
    return {"model": train_adapter.BASE_ID, "arguments": vars(args) | {"out": None}, "curves": study.curves}


def table(curves: dict[str, list[tuple[int, float, float]]]) -> str:
    lines = [
        "| after | steps | loss, 1800-1849 | perplexity | loss, 1850-1899 | perplexity |",
        "|---|---|---|---|---|---|",
        _row("the base", (0, *curves["LoRA 1"][0][1:])),
    ]
    return "\n".join([*lines, *(_row(name, curve[-1]) for name, curve in curves.items())])


def _row(name: str, found: tuple[int, float, float]) -> str:
    step, first, second = found
    return f"| {name} | {step} | {math.log(first):.3f} | {first:.2f} | {math.log(second):.3f} | {second:.2f} |"


def plot(curves: dict[str, list[tuple[int, float, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "lora-export"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for half, (ax, years) in enumerate(zip(axes, ("1800–1849", "1850–1899"), strict=True)):
        for name, curve in curves.items():
            points = [(point[0], point[1 + half]) for point in curve]
            ax.plot(*zip(*points, strict=True), marker="o", markersize=3 if len(points) > 1 else 7, label=name)
        ax.set(xlabel="step", title=f"held-out messages of {years}")
    axes[0].set_ylabel("perplexity")
    axes[1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for adapters, merged folders and figures")
    parser.add_argument("--short", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    steps, watch, count = (3, 3, 4) if args.short else (20, 10, 12)
    words = ["--out=unused", "--targets=v_proj,o_proj,down_proj", f"--steps={steps}", f"--watch={watch}"]
    found = run(prepare_smollm2.model(), train_adapter.parser().parse_args(words), args.out, count)
    (args.out / "continued.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (args.out / "continued.md").write_text(table(found["curves"]) + "\n", encoding="utf-8")
    plot(found["curves"], args.out / "continued.svg")
    print(table(found["curves"]))


if __name__ == "__main__":
    main()
