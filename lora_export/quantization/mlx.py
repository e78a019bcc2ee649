"""Weights that mlx-lm quantized: W = scale · q + bias for each group of inputs (mode "affine"), or W = scale · q.

X.weight U32 (out, in · B/32), values run on from word to word, lowest bits first; X.scales (out, in / size). Mode
"affine": codes of 2, 3, 4, 5, 6 or 8 bits, X.biases of the shape of X.scales, both floats. "mxfp4", "nvfp4": codes
are E2M1; "mxfp8": E4M3; X.scales U8 are E8M0 for mx, E4M3 for nv; no biases. config.json: `quantization`, with
group_size, bits and mode, and the same for layers of their own by their path (false: not quantized).

mlx-lm gives the tensors of many architectures other names, shapes or even values (norms that lack their 1); MODELS
lists those that it leaves as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_export.contracts import TensorInfo, TensorSource
from lora_export.quantization.gptq import in_groups
from lora_export.quantization.packed import unpack
from lora_export.quantization.settings import decoded_settings, settings_of
from lora_export.quantization.stored import E2M1, FLOATS, QuantizedWeight, expect, odd, part, unread
from lora_export.storage.documents import decode

if TYPE_CHECKING:
    import torch

TENSORS = "tensors such as …q_proj.scales"
BITS = (2, 3, 4, 5, 6, 8)
MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # bits and group size
# model_type of config.json: mlx_lm/models/ of 0.32 neither renames nor changes what it reads of these.
MODELS = frozenset(
    {
        "cohere", "cohere2", "exaone4", "ernie4_5", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "granite",
        "helium", "hunyuan_v1_dense", "llama", "mistral", "nemotron", "olmo2", "olmo3", "phi", "phi3", "qwen2",
        "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2",
    }
)  # fmt: skip


@dataclass(frozen=True)
class MlxRows:
    """packed: int32 (out, words); scale, bias: fp32 (out, groups); mode: what a code stands for."""

    packed: "torch.Tensor"
    bits: int
    mode: str
    scale: "torch.Tensor"
    bias: "torch.Tensor | None"

    def rows(self, start: int, stop: int) -> "torch.Tensor":
        """Rows [start, stop) in fp32."""
        codes = self._values(unpack(self.packed[start:stop], self.bits))
        grouped = codes.reshape(len(codes), self.scale.shape[1], -1) * self.scale[start:stop, :, None]
        if self.bias is not None:
            grouped = grouped + self.bias[start:stop, :, None]
        return grouped.reshape(codes.shape)

    def _values(self, codes: "torch.Tensor") -> "torch.Tensor":
        import torch

        if self.mode == "affine":
            return codes.float()
        if self.bits == 8:
            return codes.to(torch.uint8).view(torch.float8_e4m3fn).float()
        return torch.tensor([*E2M1, *(-v for v in E2M1)])[codes]


@dataclass(frozen=True)
class MlxWeight(QuantizedWeight):
    bits: int
    mode: str

    def load(self, source: TensorSource) -> MlxRows:
        import torch

        packed, scale, *bias = (source.read(name) for name in self.parts)
        if self.mode != "affine":
            scale = scale.view(torch.float8_e4m3fn if self.mode == "nvfp4" else torch.float8_e8m0fnu)
        return MlxRows(
            packed.view(torch.int32), self.bits, self.mode, scale.float(), bias[0].float() if bias else None
        )


@dataclass(frozen=True)
class MlxSettings:
    """Of all layers, or of one."""

    group_size: int
    bits: int
    mode: str = "affine"


def claims(settings: Mapping[str, Any]) -> bool:
    """mlx-lm writes no quant_method."""
    return {"group_size", "bits"} <= settings.keys()


def describe(settings: Mapping[str, Any]) -> str:
    return in_groups("MLX", settings)


def find(source: TensorSource, config: Mapping[str, Any], dtype: str) -> list[MlxWeight]:
    """dtype: of weights that have no float beside them."""
    settings = decoded_settings(config, MlxSettings)
    if config.get("model_type") not in MODELS:
        raise unread(
            f"an MLX folder of the architecture {config.get('model_type')!r}, whose tensors mlx-lm may have "
            "renamed, transposed or changed",
            ", ".join(sorted(MODELS)),
            "give the Hugging Face model that this one was converted from as -b",
        )
    modules, own = [n.removesuffix(".scales") for n in source.tensors if n.endswith(".scales")], settings_of(config)
    return [_weight(source, m, _of_layer((own or {}).get(m), settings, m), dtype) for m in modules]


def _of_layer(own: object, settings: MlxSettings, module: str) -> MlxSettings:
    return (
        decode(own, MlxSettings, f"quantization of {module}", "config.json") if isinstance(own, dict) else settings
    )


def _weight(source: TensorSource, module: str, settings: MlxSettings, dtype: str) -> MlxWeight:
    weight, mode, bits, size = f"{module}.weight", settings.mode, settings.bits, settings.group_size
    packed = part(source, weight, weight, ("U32",))
    if mode in MODES:
        scale = part(source, weight, f"{module}.scales", ("U8",))
        if (bits, size) != MODES[mode]:
            raise odd(packed, f"{mode} with {bits} bits in groups of {size}", str(MODES[mode]))
        shape = (packed.shape[0], _columns(packed, scale, bits, size))
        return MlxWeight(weight, (weight, scale.name), shape, dtype, bits, mode)
    if mode != "affine" or bits not in BITS or size < 1:
        modes = ", ".join(("affine", *MODES))
        raise odd(packed, f"mode {mode!r}, {bits} bits in groups of {size}", f"{modes}; bits of {BITS}")
    scale, bias = (part(source, weight, f"{module}.{n}", FLOATS) for n in ("scales", "biases"))
    expect(bias, scale.shape)
    shape = (packed.shape[0], _columns(packed, scale, bits, size))
    return MlxWeight(weight, (weight, scale.name, bias.name), shape, scale.dtype, bits, mode)


def _columns(packed: TensorInfo, scale: TensorInfo, bits: int, size: int) -> int:
    """The number of inputs, by the scales; refused if the codes are another number."""
    columns = scale.shape[1] * size
    if columns * bits % 32:
        raise odd(scale, f"the shape is {list(scale.shape)}", f"whole words of {bits} bits")
    expect(scale, (packed.shape[0], columns // size))
    expect(packed, (packed.shape[0], columns * bits // 32))
    return columns
