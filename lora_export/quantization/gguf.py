"""GGUF: the blocks of llama.cpp (Q4_0 to Q8_0, K- and I-quants, floats), read by the gguf package.

Its names become transformers' by the package's own map. Three things that llama.cpp's converter did are undone: the
rows of a Llama's queries and keys are in pairs for its rotary embedding, Gemma's and Nemotron's norms have their 1
added, dimensions are written from the innermost on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_export import meta_model
from lora_export.contracts import TensorInfo, TensorSource
from lora_export.errors import CheckpointError
from lora_export.quantization.stored import QuantizedWeight, folder_of, odd

if TYPE_CHECKING:
    import torch

TENSORS = "tensors such as blk.0.attn_q.weight"
# general.architecture of the file → the model_type that config.json may have.
ARCHITECTURES = {
    "llama": ("llama", "mistral"),
    "qwen2": ("qwen2",),
    "qwen3": ("qwen3",),
    "gemma": ("gemma",),
    "gemma2": ("gemma2",),
    "gemma3": ("gemma3_text",),
    "phi3": ("phi3",),
    "starcoder2": ("starcoder2",),
    "nemotron": ("nemotron",),
}
ADDED_ONE = ("gemma", "gemma2", "gemma3", "nemotron")
# What transformers computes from config.json.
COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True)
class GgufRows:
    """blocks: uint8 (rows, bytes of a row) as they lie in the file; heads: of rows in pairs, 0 for others; less:
    what was added to every number."""

    blocks: "torch.Tensor"
    kind: str
    shape: tuple[int, ...]
    heads: int
    less: float

    def rows(self, start: int, stop: int) -> "torch.Tensor":
        """Rows [start, stop) in fp32."""
        import gguf
        import torch

        raw = self.blocks[self._places(start, stop)].numpy()
        values = torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType[self.kind]).copy())
        return (values - self.less if self.less else values).reshape(stop - start, *self.shape[1:])

    def _places(self, start: int, stop: int) -> "torch.Tensor":
        """Where these rows lie: of a head, row i of the first half and row i of the second are neighbours there."""
        import torch

        rows = torch.arange(start, stop)
        if not self.heads:
            return rows
        size = self.shape[0] // self.heads
        within = rows % size
        return rows - within + within % (size // 2) * 2 + within // (size // 2)


@dataclass(frozen=True)
class GgufWeight(QuantizedWeight):
    kind: str
    heads: int
    less: float

    def load(self, source: TensorSource) -> GgufRows:
        info = source.tensors[self.parts[0]]
        blocks = source.read_bytes(info.name, 0, info.nbytes).reshape(self.shape[0], -1)
        return GgufRows(blocks, self.kind, self.shape, self.heads, self.less)


def find(source: TensorSource, config: Mapping[str, Any], dtype: str) -> list[GgufWeight]:
    """Every weight by its name in transformers."""
    import gguf

    architecture = config["quantization_config"].get("architecture")
    if config.get("model_type") not in ARCHITECTURES.get(str(architecture), ()):
        known = "; ".join(f"{k} with {' or '.join(v)}" for k, v in ARCHITECTURES.items())
        raise _unlike(source, f"GGUF of the architecture {architecture!r} with {config.get('model_type')!r}", known)
    plain = {k: v for k, v in config.items() if k != "quantization_config"}
    shapes = {n: tuple(p.shape) for n, p in meta_model.build(folder_of(source), plain).named_parameters()}
    kinds = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], int(config.get("num_hidden_layers") or 0))
    weights, claimed = [], set()
    for weight, shape in shapes.items():
        stored = names.get_name(weight, try_suffixes=(".weight", ".bias"))
        info = source.tensors.get(stored or "")
        if info is None or info.shape != shape:
            has = f"of shape {list(info.shape)}" if info else "missing"
            raise _unlike(
                source, f"{stored or 'a tensor'} is {has}", f"shape {list(shape)}, by config.json", weight
            )
        claimed.add(info.name)
        heads = _heads(config, info.name) if architecture == "llama" else 0
        less = 1.0 if architecture in ADDED_ONE and info.name.endswith("norm.weight") else 0.0
        weights.append(GgufWeight(weight, (info.name,), shape, dtype, _kind(info), heads, less))
    left = source.tensors.keys() - claimed - set(COMPUTED)
    if left:
        raise _unlike(source, f"the model that config.json describes has no weight {min(left)}", "no other tensors")
    return weights


def _heads(config: Mapping[str, Any], name: str) -> int:
    queries = int(config.get("num_attention_heads") or 0)
    if ".attn_q." in name:
        return queries
    return int(config.get("num_key_value_heads") or queries) if ".attn_k." in name else 0


def _kind(info: TensorInfo) -> str:
    """The ggml type of a tensor; CheckpointError for one that the gguf package does not read."""
    import gguf
    import numpy as np

    kind = gguf.GGMLQuantizationType[info.dtype]
    size = gguf.GGML_QUANT_SIZES[kind][1]
    try:
        gguf.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
        text = f"the type is {info.dtype}, which the gguf package does not read"
        raise odd(info, text, "floats, Q4_0 to Q8_0, K- or I-quants") from None
    return info.dtype


def _unlike(source: TensorSource, found: str, expected: str, tensor: str | None = None) -> CheckpointError:
    return CheckpointError(
        found,
        where=next((t.file for t in source.tensors.values()), None),
        tensor=tensor,
        expected=expected,
        next_step="put the config.json of the original model beside the GGUF, or give that model as -b",
    )
