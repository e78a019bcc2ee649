"""Train SmolLM2-135M-Instruct with LoRA, QLoRA, AdaLoRA and DoRA of several ranks, and watch it learn by heart.

    python examples/compare_training.py --out training-study            # an hour on two CPU cores
    python examples/compare_training.py --out training-study --short    # six minutes, to see that it runs

Two questions, a plot each. Which method and rank: perplexity on held-out messages of the 1800s against the number
of steps. Against overfitting: the same LoRA trained on a few windows alone, plainly, with dropout, with weight
decay and with both; held-out perplexity and that of what is learnt. study.json has every figure.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prepare_smollm2
import torch
import train_adapter
from peft import get_peft_model

TARGETS = "v_proj,o_proj,down_proj"


@dataclass(frozen=True)
class Arm:
    """One training. windows: 0 to draw from the whole text."""

    method: str
    rank: int
    steps: int
    windows: int = 0
    dropout: float = 0.0
    weight_decay: float = 0.0

    @property
    def name(self) -> str:
        extra = [f"dropout {self.dropout}"] if self.dropout else []
        extra += [f"weight decay {self.weight_decay}"] if self.weight_decay else []
        return f"{self.method}, rank {self.rank}" if not self.windows else " and ".join(extra) or "neither"

    def arguments(self, watch: int) -> argparse.Namespace:
        given = {"method": self.method, "rank": self.rank, "alpha": 2 * self.rank, "steps": self.steps}
        given |= {"windows": self.windows, "dropout": self.dropout, "weight-decay": self.weight_decay}
        words = [f"--{name}={value}" for name, value in given.items()]
        return train_adapter.parser().parse_args(
            ["--out=unused", f"--targets={TARGETS}", f"--watch={watch}", *words]
        )


def arms(short: bool) -> tuple[list[Arm], list[Arm]]:
    """Those that compare methods and ranks, and those that learn a few windows by heart."""
    steps, long, ranks, few = (4, 4, (4, 8), 4) if short else (30, 60, (4, 8, 16), 8)
    methods = ["lora", "qlora", "adalora", "dora"]
    return (
        [Arm(method, rank, steps) for method in methods for rank in ranks],
        [Arm("lora", 16, long, few, dropout, decay) for dropout in (0.0, 0.3) for decay in (0.0, 3.0)],
    )


def run(arm: Arm, base: Path, text: tuple[torch.Tensor, torch.Tensor], watch: int, count: int) -> dict[str, Any]:
    """The curve of one training: (step, perplexity of what is learnt, held-out perplexity)."""
    args = arm.arguments(watch)
    torch.manual_seed(args.seed)
    learnt, held_out = text
    seen = train_adapter.spread(learnt, arm.windows or count, args.sequence)
    unseen = train_adapter.spread(held_out, count, args.sequence)
    model = get_peft_model(train_adapter.load_base(base, arm.method), train_adapter.adapter_config(args))
    curve: list[tuple[int, float, float]] = []

    def look(step: int) -> None:
        measured = (train_adapter.perplexity(model, windows, args.batch) for windows in (seen, unseen))
        curve.append((step, *(round(value, 3) for value in measured)))
        print(f"{arm.name}: step {step}, learnt {curve[-1][1]:.2f}, held out {curve[-1][2]:.2f}", flush=True)

    look(0)
    started = time.monotonic()
    train_adapter.train(model, train_adapter.anywhere(learnt, args), args, look)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    seconds = round(time.monotonic() - started, 1)
    return {**vars(arm), "name": arm.name, "trainable": trainable, "seconds": seconds, "curve": curve}


def table(results: list[dict[str, Any]]) -> str:
    lines = ["| training | trained numbers | before | after | learnt |", "|---|---|---|---|---|"]
    for one in results:
        before, after = one["curve"][0], one["curve"][-1]
        lines.append(
            f"| {one['name']} | {one['trainable']:,} | {before[2]:.2f} | {after[2]:.2f} | {after[1]:.2f} |"
        )
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], title: str, learnt: bool, path: Path) -> None:
    """Held-out perplexity against steps; with `learnt`, that of what is trained on beside it, dashed."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "lora-export"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(r["method"] for r in results))}
    styles = dict(zip(sorted({r["rank"] for r in results}), ("-", "--", ":"), strict=False))
    for at, one in enumerate(results):
        steps, seen, unseen = zip(*one["curve"], strict=True)
        colour = f"C{at}" if learnt else colours[one["method"]]
        axes.plot(steps, unseen, styles[one["rank"]], color=colour, label=one["name"])
        if learnt:
            axes.plot(steps, seen, "--", color=colour, linewidth=1)
    axes.set(xlabel="step", ylabel="perplexity" if learnt else "held-out perplexity", title=title)
    axes.legend(fontsize="small", ncol=1 if learnt else 2)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for study.json, study.md and the plots")
    parser.add_argument("--short", action="store_true", help="a few steps of each, to see that it runs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    base = prepare_smollm2.model()
    text = train_adapter.read_tokens(prepare_smollm2.speeches(), base)
    watch, count = (2, 4) if args.short else (10, 12)
    methods, overfitting = ([run(arm, base, text, watch, count) for arm in some] for some in arms(args.short))
    study = {"model": train_adapter.BASE_ID, "targets": TARGETS, "methods": methods, "overfitting": overfitting}
    (args.out / "study.json").write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")
    words = f"{table(methods)}\n\nOn {overfitting[0]['windows']} windows alone:\n\n{table(overfitting)}\n"
    (args.out / "study.md").write_text(words, encoding="utf-8")
    plot(methods, "Methods and ranks", False, args.out / "methods.svg")
    plot(overfitting, "Learnt by heart (dashed: what is trained on)", True, args.out / "overfitting.svg")
    print(words, file=sys.stderr)


if __name__ == "__main__":
    main()
