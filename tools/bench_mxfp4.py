"""Time and memory of merging a gpt-oss base in MXFP4 beside `cp -r` of its 16-bit size.

    python tools/bench_mxfp4.py --out /dev/shm

The base is random and gpt-oss-shaped: fused experts in blocks and scales, everything else in bfloat16. The adapter
is LoRA on its attention. Every arm is a whole process, as in bench_merge.py.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_merge import MEASURED, merge_command, own
from processes import Arm, Sample, circumstances, in_turn, save, shown, spread
from safetensors.torch import save_file

EXPERTS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD = 32, 1440, 1440, 32, 8, 64
VOCABULARY, RANK = 32_000, 16


def write_base(folder: Path, layers: int) -> None:
    """Attention, router, embedding and head in bfloat16; experts as gpt-oss stores them."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).bfloat16()

    def codes(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)

    tensors = {
        "model.embed_tokens.weight": normal(VOCABULARY, HIDDEN),
        "lm_head.weight": normal(VOCABULARY, HIDDEN),
    }
    tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    for layer in range(layers):
        name = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}.{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        sizes = {"q": (HEADS * HEAD, HIDDEN), "k": (KV_HEADS * HEAD, HIDDEN), "v": (KV_HEADS * HEAD, HIDDEN)}
        for part, size in (sizes | {"o": (HIDDEN, HEADS * HEAD)}).items():
            tensors[f"{name}.self_attn.{part}_proj.weight"] = normal(*size)
            tensors[f"{name}.self_attn.{part}_proj.bias"] = normal(size[0])
        tensors[f"{name}.self_attn.sinks"] = normal(HEADS)
        tensors[f"{name}.mlp.router.weight"] = normal(EXPERTS, HIDDEN)
        tensors[f"{name}.mlp.router.bias"] = normal(EXPERTS)
        for part, out, width in (("gate_up", 2 * INTERMEDIATE, HIDDEN), ("down", HIDDEN, INTERMEDIATE)):
            experts = f"{name}.mlp.experts.{part}_proj"
            tensors[f"{experts}_blocks"] = codes(0, 256, EXPERTS, out, width // 32, 16)
            tensors[f"{experts}_scales"] = codes(116, 124, EXPERTS, out, width // 32)
            tensors[f"{experts}_bias"] = normal(EXPERTS, out)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config: dict[str, Any] = {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS, "num_experts_per_tok": 4,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD, "vocab_size": VOCABULARY, "tie_word_embeddings": False, "dtype": "bfloat16",
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def write_adapter(folder: Path, layers: int) -> None:
    """LoRA on q, k, v and o."""
    generator, tensors = torch.Generator().manual_seed(2), {}
    queries, keys = HEADS * HEAD, KV_HEADS * HEAD
    sizes = {"q": (queries, HIDDEN), "k": (keys, HIDDEN), "v": (keys, HIDDEN), "o": (HIDDEN, queries)}
    for layer in range(layers):
        for part, (out, width) in sizes.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{part}_proj"
            tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, width, generator=generator) * 0.02
            tensors[f"{name}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * 0.02
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 24, "target_modules": [f"{p}_proj" for p in sizes]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def run(options: argparse.Namespace) -> tuple[int, list[Sample]]:
    """(bytes of the 16-bit model, samples)."""
    with tempfile.TemporaryDirectory(prefix="bench-mxfp4-", dir=options.out) as scratch:
        base, adapter, copied, output = (Path(scratch, n) for n in ("base", "adapter", "merged", "output"))
        write_base(base, options.layers)
        write_adapter(adapter, options.layers)
        subprocess.run(merge_command(base, adapter, copied), check=True, stdout=subprocess.DEVNULL)
        arms = [
            Arm("imports", [sys.executable, "-c", "import numpy, torch"], (), output),
            Arm("cp", ["cp", "-r", copied, output], (copied,), output),
            Arm("ours", merge_command(base, adapter, output), (base, adapter), output),
        ]
        samples = in_turn(arms, options.repeat, sync=False, settle=options.settle)
        return sum(p.stat().st_size for p in copied.iterdir()), samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="of the base (default: %(default)s, 1.8 GB)")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions (default: %(default)s)")
    parser.add_argument("--settle", type=float, default=4.0, help="seconds of rest before every run")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()), help="folder for all files")
    parser.add_argument("--save", type=Path, help="JSON file to write (default: a new one in benchmarks/results)")
    options = parser.parse_args()
    load = [os.getloadavg()]
    size, samples = run(options)
    load.append(os.getloadavg())
    arms: dict[str, list[Sample]] = {}
    for sample in samples:
        arms.setdefault(sample.arm, []).append(sample)
    summary: dict[str, Any] = {
        arm: {c: spread([getattr(s, c) for s in each]) for c in MEASURED} for arm, each in arms.items()
    }
    copies = [s.seconds for s in arms["cp"]]
    stages = [own(s)["seconds"] for s in arms["ours"]]
    imports = [s.seconds for s in arms["imports"]]
    ratios = {
        "process": [o.seconds / c for o, c in zip(arms["ours"], copies, strict=True)],
        "process without imports": [
            (o.seconds - i) / c for o, i, c in zip(arms["ours"], imports, copies, strict=True)
        ],
        "merge stage": [s / c for s, c in zip(stages, copies, strict=True)],
    }
    summary |= {f"{name} to cp": spread(values) for name, values in ratios.items()}
    print(f"MXFP4 to {size / 1e9:.2f} GB in 16 bits, {options.repeat} repetitions, median (least–most)")
    for name in ratios:
        print(f"{name:<26} {shown(summary[f'{name} to cp'], 1, '.2f')} × cp")
    print(f"peak {shown(summary['ours']['peak_rss_bytes'], 1e6, '.0f')} MB")
    around = circumstances(options.out, options.out)
    chosen = {name: getattr(options, name) for name in ("layers", "repeat", "settle")}
    document = around | {"options": chosen, "bytes": {"output": size}, "load": load, "summary": summary}
    save(options.save, "merge-mxfp4", document | {"samples": [s.raw() for s in samples]})


if __name__ == "__main__":
    main()
