"""Train a small LoRA, QLoRA, DoRA or AdaLoRA adapter for SmolLM2-135M-Instruct on messages of the 1800s.

    python examples/train_adapter.py --method lora --out lora-speeches --targets v_proj,o_proj,down_proj
    python examples/train_adapter.py --method qlora --out qlora-speeches --targets q_proj,v_proj

A step takes a few seconds on two CPU cores. Every tenth message is held out; perplexity on those is measured
before the training, after it, and once more with the adapter as it was saved, in bfloat16. With --watch N it is
measured every N steps, beside that of what is trained on: where the first rises while the second falls, the adapter
learns by heart (try --windows 8), and --dropout and --weight-decay are worth a try. compare_training.py does so for
all four methods and several ranks.
"""

import argparse
import json
import math
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import bitsandbytes as bnb
import prepare_smollm2
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    get_linear_schedule_with_warmup,
)

BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HELD_OUT_WINDOWS = 64
Sampler = Callable[[], Tensor]  # a batch of windows, [batch, sequence]


def load_base(folder: Path, method: str) -> PreTrainedModel:
    """The frozen base in float32; for QLoRA all linear layers but lm_head in NF4, doubly quantized."""
    if method != "qlora":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=nf4, device_map="cpu"
    )
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # On CPUs with AVX512-BF16 an eval-mode forward repacks the 4-bit weight in place for good;
            # whatever dequantizes it afterwards reads garbage.
            module.support_avx512bf16_for_cpu = False
    return model


def read_tokens(speeches: Path, base: Path) -> tuple[Tensor, Tensor]:
    """Token ids of the messages to train on and, never trained on, of every tenth message."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    files = sorted(speeches.glob("18*.txt"))
    if not files:
        raise SystemExit(f"{speeches}: no 18*.txt here. Run examples/prepare_smollm2.py first.")

    def encode(some: list[Path]) -> Tensor:
        texts = [file.read_text(encoding="utf-8") for file in some]
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor([token for text in ids for token in text])

    return encode([f for i, f in enumerate(files) if i % 10 != 9]), encode(files[9::10])


def adapter_config(args: argparse.Namespace) -> LoraConfig:
    """AdaLoRA starts with half as much rank again, and prunes it to the wanted one in the middle of the run."""
    shared = {
        "target_modules": args.targets.split(","),
        "lora_alpha": args.alpha,
        "lora_dropout": args.dropout,
        "task_type": "CAUSAL_LM",
    }
    if args.method != "adalora":
        return LoraConfig(r=args.rank, use_dora=args.method == "dora", **shared)
    warm, left = args.steps // 5, args.steps // 3
    return AdaLoraConfig(
        init_r=args.rank * 3 // 2,
        target_r=args.rank,
        total_step=args.steps,
        tinit=warm,
        tfinal=left,
        deltaT=1,
        **shared,
    )


@torch.no_grad()
def perplexity(model: torch.nn.Module, windows: Tensor, batch: int) -> float:
    """exp of the mean cross-entropy per predicted token; windows: [count, sequence]."""
    model.eval()
    losses = []
    for some in windows.split(batch):
        logits = model(input_ids=some).logits[:, :-1].flatten(0, 1)  # AdaLoRA's own loss holds a penalty
        losses.append(torch.nn.functional.cross_entropy(logits, some[:, 1:].flatten()).item() * len(some))
    return math.exp(sum(losses) / len(windows))


def spread(tokens: Tensor, count: int, sequence: int) -> Tensor:
    """`count` windows that are spread evenly over a text, [count, sequence]."""
    starts = torch.linspace(0, len(tokens) - sequence, count).long()
    return torch.stack([tokens[start : start + sequence] for start in starts])


def anywhere(tokens: Tensor, args: argparse.Namespace) -> Sampler:
    """Random windows of a text; of --windows of it, where so few are to be learnt from."""
    draw = random.Random(args.seed)
    few = spread(tokens, args.windows, args.sequence) if args.windows else None

    def batch() -> Tensor:
        if few is not None:
            return few[[draw.randrange(len(few)) for _ in range(args.batch)]]
        starts = [draw.randrange(len(tokens) - args.sequence) for _ in range(args.batch)]
        return torch.stack([tokens[start : start + args.sequence] for start in starts])

    return batch


def train(
    model: PeftModel, sample: Sampler, args: argparse.Namespace, watch: Callable[[int], None] | None = None
) -> None:
    """AdamW; the rate rises over the first steps, then falls to zero. watch: called every --watch steps."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.lr, weight_decay=args.weight_decay)
    schedule = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=5, num_training_steps=args.steps)
    for step in range(1, args.steps + 1):
        model.train()
        batch = sample()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        if args.method == "adalora":
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        if step % 5 == 0 or step == args.steps:
            print(f"step {step}/{args.steps}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
        if watch and args.watch and (step % args.watch == 0 or step == args.steps):
            watch(step)


def watcher(model: PeftModel, seen: Tensor, unseen: Tensor, args: argparse.Namespace) -> Callable[[int], None]:
    """Prints the perplexities on windows that are trained on and on others."""

    def watch(step: int) -> None:
        learnt, other = perplexity(model, seen, args.batch), perplexity(model, unseen, args.batch)
        print(f"step {step}: perplexity of what is trained on {learnt:.2f}, held out {other:.2f}", flush=True)

    return watch


def save(model: PeftModel, out: Path) -> None:
    """Write the adapter in PEFT's format, its tensors rounded to bfloat16."""
    # The published name, not the folder it was loaded from: that one means nothing on another machine.
    model.peft_config["default"].base_model_name_or_path = BASE_ID
    rounded = {name: tensor.bfloat16() for name, tensor in model.state_dict().items() if ".lora_" in name}
    model.save_pretrained(out, state_dict=rounded, save_embedding_layers=False)
    # PEFT orders the targets as a Python set does, which differs from run to run.
    path = out / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def model_card(args: argparse.Namespace, before: float, after: float, saved: float) -> str:
    shown = ["method", "targets", "rank", "alpha", "steps", "lr", "sequence", "batch", "seed"]
    shown += [name for name in ("dropout", "weight_decay", "windows") if getattr(args, name)]
    command = f"python examples/train_adapter.py --out {args.out.name} " + " ".join(
        f"--{name.replace('_', '-')} {getattr(args, name)}" for name in shown
    )
    if args.method == "qlora":
        trained_on = (
            "Trained on the base quantized on the fly from float32 to 4 bits (bitsandbytes NF4, block\n"
            "size 64, double quantization, compute in float32; `lm_head` and the embeddings not quantized).\n"
            "The perplexities below are those of the 4-bit base without and with the adapter."
        )
    else:
        trained_on = "Trained on the base in float32."
    return f"""\
---
base_model: {BASE_ID}
library_name: peft
pipeline_tag: text-generation
license: apache-2.0
tags:
- {args.method}
---
# {args.out.name}

A small adapter that makes SmolLM2-135M-Instruct write like a presidential message of the 1800s. It is an
example for `lora-export` and good for nothing else.

- Base: {BASE_ID} (Apache-2.0), dequantized from its Q4_1 GGUF by `examples/prepare_smollm2.py`
- Data: State of the Union messages of 1800 to 1899, in the public domain; every tenth one held out
- Adapter: {args.method}, rank {args.rank}, alpha {args.alpha}, on {args.targets}; tensors in bfloat16

{trained_on}

| perplexity on the held-out messages | |
|---|---|
| before | {before:.2f} |
| after training | {after:.2f} |
| saved adapter (bfloat16), loaded again | {saved:.2f} |

Measured on {HELD_OUT_WINDOWS} windows of {args.sequence} tokens. The command:

    {command}
"""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--base", type=Path, help=f"{BASE_ID}; default: what prepare_smollm2.py makes")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter")
    parser.add_argument("--method", choices=["lora", "qlora", "dora", "adalora"], default="lora")
    parser.add_argument("--targets", default="q_proj,v_proj", help="modules to adapt, with commas")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--sequence", type=int, default=128, help="tokens in a window")
    parser.add_argument("--batch", type=int, default=4, help="windows in a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dropout", type=float, default=0.0, help="of what enters the adapter, in training")
    parser.add_argument("--weight-decay", type=float, default=0.0, help="of the adapter's matrices (AdamW)")
    parser.add_argument("--windows", type=int, default=0, help="train on so few windows of the text; 0: on all")
    parser.add_argument("--watch", type=int, default=0, help="measure every so many steps; 0: at the end alone")
    return parser


def main() -> None:
    args = parser().parse_args()
    torch.manual_seed(args.seed)
    base = args.base or prepare_smollm2.model()
    tokens, held_out = read_tokens(prepare_smollm2.speeches(), base)
    windows = spread(held_out, HELD_OUT_WINDOWS, args.sequence)

    model = get_peft_model(load_base(base, args.method), adapter_config(args))
    before = perplexity(model, windows, args.batch)  # lora_B starts at zero: this is the base
    print(f"held-out perplexity before: {before:.2f}", flush=True)
    watch = watcher(model, spread(tokens, args.windows or HELD_OUT_WINDOWS, args.sequence), windows, args)
    train(model, anywhere(tokens, args), args, watch)
    after = perplexity(model, windows, args.batch)
    print(f"held-out perplexity after: {after:.2f}", flush=True)

    save(model, args.out)
    del model
    reloaded = PeftModel.from_pretrained(load_base(base, args.method), args.out)
    saved = perplexity(reloaded, windows, args.batch)
    print(f"held-out perplexity, saved adapter in bfloat16: {saved:.2f}", flush=True)
    (args.out / "README.md").write_text(model_card(args, before, after, saved), encoding="utf-8")


if __name__ == "__main__":
    main()
