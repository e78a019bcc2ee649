"""Random Llama-shaped bases and adapters on disk, written tensor by tensor: no model is ever in memory.

    python tools/random_models.py WORK SIZE BASE KIND

writes what is missing of WORK/SIZE/bf16, WORK/SIZE/BASE and WORK/SIZE/KIND. Values are normal with σ 0.02, B of an
adapter included; the same shape gives the same bytes.
"""

import argparse
import contextlib
import math
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

KINDS = ("lora", "dora", "adalora")
BASES = ("bf16", "nf4", "fp8")
FP8_BLOCK = 128  # rows and columns that share a scale
RANK, ALPHA = 16, 24
INITIAL_RANK = 24  # of AdaLoRA, before pruning; ranks from 8 to 24 are left, 16 on average
SIGMA = 0.02
MAX_SHARD = 5 * 10**9  # bytes
BLOCK = 2**22  # values drawn at a time


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000
    tied: bool = False
    positions: int = 2048
    epsilon: float = 1e-6
    theta: float = 10_000.0

    def linears(self) -> dict[str, tuple[int, int]]:
        """Module → (out, in), for the seven linear projections of every layer."""
        kv = self.hidden // self.heads * self.kv_heads
        one_layer = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }
        return {f"model.layers.{i}.{name}": size for i in range(self.layers) for name, size in one_layer.items()}

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Tensor → shape, of the whole model."""
        norms = [f"model.layers.{i}.{n}" for i in range(self.layers)
                 for n in ("input_layernorm", "post_attention_layernorm")]  # fmt: skip
        return {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden),
            **{f"{name}.weight": size for name, size in self.linears().items()},
            **{f"{name}.weight": (self.hidden,) for name in (*norms, "model.norm")},
            **({} if self.tied else {"lm_head.weight": (self.vocabulary, self.hidden)}),
        }


SHAPES = {  # 135M: SmolLM2's
    "tiny": Shape(hidden=64, intermediate=192, layers=2, heads=4, kv_heads=2, vocabulary=320, tied=True),
    "135M": Shape(
        hidden=576,
        intermediate=1536,
        layers=30,
        heads=9,
        kv_heads=3,
        vocabulary=49152,
        tied=True,
        positions=8192,
        epsilon=1e-5,
        theta=100_000.0,
    ),
    "0.1B": Shape(hidden=768, intermediate=2048, layers=12, heads=12, kv_heads=12),
    "1.1B": Shape(hidden=2048, intermediate=5632, layers=22, heads=32, kv_heads=4),
    "3B": Shape(hidden=3072, intermediate=8192, layers=28, heads=24, kv_heads=8),
    "7B": Shape(hidden=4096, intermediate=11008, layers=32, heads=32, kv_heads=32),
}


@contextlib.contextmanager
def written_once(folder: Path) -> Iterator[Path | None]:
    """A folder to fill that becomes `folder` when all is done; None if it is there already."""
    if folder.is_dir():
        yield None
        return
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    partial.rename(folder)


def normal(shape: tuple[int, ...], generator: "torch.Generator") -> "torch.Tensor":
    import torch

    return torch.empty(shape).normal_(std=SIGMA, generator=generator)


def write_config(folder: Path, shape: Shape, **more: Any) -> None:
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=shape.positions,
        rms_norm_eps=shape.epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": shape.theta},
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        **more,
    ).save_pretrained(folder)


def write_base(folder: Path, shape: Shape) -> None:
    """bf16 weights in shards of at most 5 GB."""
    import torch

    from lora_export.checkpoint.shards import OutputTensor, plan_shards, write_index

    generator = torch.Generator().manual_seed(1)
    shards = plan_shards([OutputTensor(n, "BF16", s, "") for n, s in shape.weights().items()], MAX_SHARD, {})
    for shard in shards:
        with (folder / shard.file).open("wb") as file:
            file.write(shard.header)
            for tensor in shard.tensors:
                size, mean = math.prod(tensor.shape), float("norm" in tensor.name)
                for start in range(0, size, BLOCK):
                    values = normal((min(BLOCK, size - start),), generator) + mean
                    file.write(values.bfloat16().view(torch.uint8).numpy().data)
    write_index(folder, shards)
    write_config(folder, shape)
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """Byte-level BPE without merges: an export for onnxruntime-genai wants one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def write_fp8(folder: Path, shape: Shape, base: Path) -> None:
    """The linear projections of `base` in E4M3 with a scale for each block, as DeepSeek saves them, in one file."""
    import torch
    from safetensors.torch import save_file

    from lora_export.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(base)
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    for name in [f"{module}.weight" for module in shape.linears()]:
        weight = tensors[name].float()
        rows, columns = (-(-size // FP8_BLOCK) for size in weight.shape)
        blocks = torch.zeros(rows * FP8_BLOCK, columns * FP8_BLOCK)
        blocks[: weight.shape[0], : weight.shape[1]] = weight
        largest = blocks.reshape(rows, FP8_BLOCK, columns, FP8_BLOCK).abs().amax((1, 3))
        scale = largest / torch.finfo(torch.float8_e4m3fn).max
        spread = scale.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
        codes = weight / spread[: weight.shape[0], : weight.shape[1]]
        tensors |= {name: codes.to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = {"quant_method": "fp8", "weight_block_size": [FP8_BLOCK, FP8_BLOCK]}
    write_config(folder, shape, quantization_config=settings)
    write_tokenizer(folder)


def write_nf4(folder: Path, shape: Shape, base: Path) -> None:
    """The linear projections of `base` in NF4 with double quantization, a shard for each of the base's."""
    from safetensors.torch import save_file
    from transformers import BitsAndBytesConfig

    from lora_export.checkpoint import open_checkpoint
    from lora_export.checkpoint.reader import INDEX
    from lora_export.storage.sealed import write_json

    checkpoint = open_checkpoint(base)
    linears = {f"{module}.weight" for module in shape.linears()}
    weight_map: dict[str, str] = {}
    total = 0
    for path in sorted({info.file for info in checkpoint.tensors.values()}):
        shard: dict[str, torch.Tensor] = {}
        for name in (n for n, info in checkpoint.tensors.items() if info.file == path):
            weight = checkpoint.read(name)
            shard |= quantized(name, weight) if name in linears else {name: weight}
        save_file(shard, folder / path.name, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, path.name)
        total += sum(t.nbytes for t in shard.values())
    if len(set(weight_map.values())) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
    )
    write_config(folder, shape, quantization_config=settings.to_dict())


def quantized(name: str, weight: "torch.Tensor") -> dict[str, "torch.Tensor"]:
    """What bitsandbytes saves for one weight."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return {name: packed, **{f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}}


def write_adapter(folder: Path, shape: Shape, kind: str, base: Path) -> None:
    """Rank 16 and alpha 24 on every linear projection, in fp32, as PEFT saves it."""
    import torch
    from peft import AdaLoraConfig, LoraConfig
    from safetensors.torch import save_file

    from lora_export.checkpoint import open_checkpoint

    generator, dice, checkpoint = torch.Generator().manual_seed(2), random.Random(3), open_checkpoint(base)
    tensors: dict[str, torch.Tensor] = {}
    masks: dict[str, list[bool]] = {}
    leaf = "" if kind == "adalora" else ".weight"
    for module, (rows, columns) in shape.linears().items():
        rank, key = RANK, f"base_model.model.{module}"
        if kind == "adalora":
            rank = dice.randint(2 * RANK - INITIAL_RANK, INITIAL_RANK)
            kept = set(dice.sample(range(INITIAL_RANK), rank))
            masks[f"{module}.lora_E"] = [i in kept for i in range(INITIAL_RANK)]
            tensors[f"{key}.lora_E"] = normal((rank, 1), generator) / SIGMA
        if kind == "dora":
            norms = torch.linalg.norm(checkpoint.read(f"{module}.weight").float(), dim=1)
            tensors[f"{key}.lora_magnitude_vector"] = norms * (1 + normal((rows,), generator))
        tensors[f"{key}.lora_A{leaf}"] = normal((rank, columns), generator)
        tensors[f"{key}.lora_B{leaf}"] = normal((rows, rank), generator)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    common: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "lora_alpha": ALPHA,
        "target_modules": sorted({module.rpartition(".")[2] for module in shape.linears()}),
        "inference_mode": True,
    }
    if kind == "adalora":
        config = AdaLoraConfig(
            **common, init_r=INITIAL_RANK, target_r=RANK, tinit=10, tfinal=10, total_step=100, rank_pattern=masks
        )
    else:
        config = LoraConfig(**common, r=RANK, use_dora=kind == "dora")
    config.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write random bases and adapters, unless they are there.")
    parser.add_argument("work", type=Path)
    parser.add_argument("size", choices=SHAPES)
    parser.add_argument("base", choices=BASES)
    parser.add_argument("kind", choices=KINDS)
    options = parser.parse_args()
    shape, folder = SHAPES[options.size], options.work / options.size
    with written_once(folder / "bf16") as partial:
        if partial:
            write_base(partial, shape)
    for name, write in (("nf4", write_nf4), ("fp8", write_fp8)):
        if options.base == name:
            with written_once(folder / name) as partial:
                if partial:
                    write(partial, shape, folder / "bf16")
    with written_once(folder / options.kind) as partial:
        if partial:
            write_adapter(partial, shape, options.kind, folder / "bf16")


if __name__ == "__main__":
    main()
