"""Which quantized weights a checkpoint holds. One file a format; what is not known is refused by name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lora_export import meta_model as skeleton
from lora_export.contracts import RowReader, TensorSource
from lora_export.errors import CheckpointError
from lora_export.quantization import (
    autoround,
    awq,
    bitnet,
    bnb4,
    bnb8,
    compressed,
    fp8,
    gguf,
    gptq,
    hqq,
    mlx,
    modelopt,
    mxfp4,
    quanto,
    torchao,
)
from lora_export.quantization.refused import ORIGINAL, REFUSED
from lora_export.quantization.settings import dtype_of, settings_of

if TYPE_CHECKING:
    import torch


class QuantizedWeight(Protocol):
    """A weight of logical `shape` stored in `parts`; dtype is what it was before it was quantized."""

    @property
    def weight(self) -> str: ...
    @property
    def parts(self) -> tuple[str, ...]: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...

    def load(self, source: TensorSource) -> RowReader: ...


@dataclass(frozen=True)
class Transposed:
    """A Conv1D's weight, (in, out), of which bitsandbytes stored the transpose. It is dequantized as a whole."""

    stored: QuantizedWeight

    @property
    def weight(self) -> str:
        return self.stored.weight

    @property
    def parts(self) -> tuple[str, ...]:
        return self.stored.parts

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape[::-1]

    @property
    def dtype(self) -> str:
        return self.stored.dtype

    def load(self, source: TensorSource) -> "WholeRows":
        return WholeRows(self.stored.load(source).rows(0, self.stored.shape[0]).T.contiguous())


@dataclass(frozen=True)
class WholeRows:
    """Rows of a weight that is there already, in fp32."""

    value: "torch.Tensor"

    def rows(self, start: int, stop: int) -> "torch.Tensor":
        return self.value[start:stop]


def find_quantized(source: TensorSource, config: Mapping[str, Any]) -> dict[str, QuantizedWeight]:
    """Weight name → how to read it. Empty for a checkpoint that is not quantized."""
    method = method_here(source, config)
    if method is None:
        return {}
    dtype = dtype_of(source, config)
    if method not in FORMATS:
        raise CheckpointError(
            f"the base is quantized with {method!r}, which this tool does not read"
            + (f" ({REFUSED[method]})" if method in REFUSED else ""),
            where="config.json",
            expected=f"an unquantized base, or one of {', '.join(FORMATS)}",
            next_step=ORIGINAL,
        )
    find, expected = FORMATS[method]
    found = find(source, config, dtype)
    if not found:
        raise CheckpointError(
            f"config.json says that this model was quantized with {method}, but no quantized weight is here",
            where="config.json",
            expected=expected,
            next_step="download the folder again, or give the unquantized base that it was made from as -b",
        )
    return {w.weight: w for w in found}


def _bitsandbytes(source: TensorSource, config: Mapping[str, Any], dtype: str) -> list[QuantizedWeight]:
    found: list[QuantizedWeight] = [*bnb4.find(source), *bnb8.find(source, dtype)]
    types = frozenset({str(config.get("model_type"))})
    return [Transposed(w) if skeleton.is_conv1d(types, w.weight.rpartition(".")[0]) else w for w in found]


def _unnamed(source: TensorSource) -> str | None:
    """The method of a checkpoint whose config.json names none, by the names of its tensors alone."""
    if quanto.is_here(source):
        return "quanto"
    return "hqq" if any(n.endswith(".W_q") for n in source.tensors) else None


def method_here(source: TensorSource, config: Mapping[str, Any]) -> str | None:
    """The method that the configuration names; where it is silent, what the names of the tensors tell, or None."""
    settings = settings_of(config)
    return method_of(settings) if settings else _unnamed(source)


def method_of(settings: Mapping[str, Any]) -> str:
    """The method that a quantization_config names; bitsandbytes' older ones do not."""
    named = settings.get("quant_method")
    if named is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        return "bitsandbytes"
    if named is None and mlx.settings_of({"quantization": settings}):
        return "mlx"
    return str(named)


def describe(settings: Mapping[str, Any]) -> str:
    """A quantization_config in a few words."""
    method = method_of(settings)
    if method == "bitsandbytes" and settings.get("load_in_8bit"):
        return "bitsandbytes int8"
    if method == "bitsandbytes":
        double = " with double quantization" if settings.get("bnb_4bit_use_double_quant") else ""
        return f"bitsandbytes {settings.get('bnb_4bit_quant_type', '4 bits')}{double}"
    if method in ("gptq", "awq", "auto-round", "mlx"):
        order = ", act-order" if settings.get("desc_act") else ""
        name = "AutoRound" if method == "auto-round" else method.upper()
        return f"{name} {settings.get('bits')} bits, groups of {settings.get('group_size')}{order}"
    if method == "modelopt":
        return f"modelopt {settings.get('quant_algo', '')}".strip()
    if method == "fp8":
        return f"fp8 in blocks of {settings.get('weight_block_size') or 'whole tensors'}"
    return f"{method} {settings.get('format', '')}".strip()


Find = Callable[[TensorSource, Mapping[str, Any], str], Sequence[QuantizedWeight]]


def _by_settings(find: Find) -> Find:
    """Of a format that needs nothing of config.json but its own settings."""
    return lambda source, config, dtype: find(source, settings_of(config) or {}, dtype)


# The method that config.json names → how its weights are found, and what they look like.
FORMATS: dict[str, tuple[Find, str]] = {
    "bitsandbytes": (_bitsandbytes, "weights with a quant_state (4 bits) or SCB (8 bits)"),
    "gptq": (_by_settings(gptq.find), "tensors such as …q_proj.qweight"),
    "awq": (_by_settings(awq.find), "tensors such as …q_proj.qweight"),
    "fp8": (_by_settings(fp8.find), "fp8 tensors, and scales such as …q_proj.weight_scale_inv"),
    "mxfp8": (_by_settings(fp8.find), "fp8 tensors, and scales such as …q_proj.weight_scale_inv"),
    "fbgemm_fp8": (_by_settings(fp8.find), "fp8 tensors, and scales such as …q_proj.weight_scale"),
    "mxfp4": (_by_settings(mxfp4.find), "tensors such as …experts.gate_up_proj_blocks"),
    "modelopt": (_by_settings(modelopt.find), "tensors such as …q_proj.weight_scale"),
    "compressed-tensors": (
        _by_settings(compressed.find),
        "tensors such as …q_proj.weight_packed or …q_proj.weight_scale",
    ),
    "auto-round": (_by_settings(autoround.find), "tensors such as …q_proj.qweight"),
    "hqq": (_by_settings(hqq.find), "tensors such as …q_proj.W_q"),
    "quanto": (quanto.find, "tensors such as …q_proj.weight._data"),
    "torchao": (_by_settings(torchao.find), "metadata that names the parts of each weight"),
    "bitnet": (bitnet.find, "tensors such as …q_proj.weight_scale"),
    "gguf": (gguf.find, "tensors such as blk.0.attn_q.weight"),
    "mlx": (mlx.find, "tensors such as …q_proj.scales"),
}
