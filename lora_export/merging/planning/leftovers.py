"""Tensors of a base that are neither weights nor part of a quantized one.

A merge takes quantization_config out of config.json, so quantized numbers that stay behind would be read as plain
ones: they are refused, whatever the adapter touches. Scales of activations mean nothing without the quantization of
their layer, and are left out. A model may itself have integers, or a parameter that is called a scale, so the
architecture is asked.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

from lora_export.checkpoint.reader import Checkpoint
from lora_export.contracts import TensorInfo
from lora_export.errors import CheckpointError
from lora_export.merging.architecture.model import Numbers, architecture_of

# Scales of activations and of the attention's cache, not of weights. No model of transformers has such a parameter.
_DEAD = (
    "activation_scale", "input_scale", "output_scale", "k_scale", "v_scale", "q_scale", "prob_scale", "kv_scale",
    "input_global_scale", "input_scale_ub", "input_zero_point", "output_zero_point", "k_zero_point", "v_zero_point",
)  # fmt: skip
# Names that quantizers give to scales and the like, and unquantized models do not have.
_OF_QUANTIZERS = (
    "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale", "weight_zero_point", "scale_inv",
    "weight_packed", "weight_shape", "weight_g_idx", "qscale_weight", "pre_quant_scale", "qweight", "qzeros",
    "g_idx", "scales", "absmax", "quant_map", "nested_absmax", "nested_quant_map", "SCB", "zero_point",
)  # fmt: skip
_SMALL_FLOATS = frozenset(
    {"F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4"}
)
_CODES = frozenset({"U8", "I8", "U16", "I16", "U32", "I32"})
# Masks and positions that old versions of transformers saved, as bytes or integers.
_BUFFERS = ("bias", "masked_bias", "position_ids", "token_type_ids")
_HINTS = {
    "_blocks": "MXFP4, as in gpt-oss", "_scales": "MXFP4, as in gpt-oss", "weight_packed": "compressed-tensors",
    "qweight": "GPTQ or AWQ", "qzeros": "GPTQ or AWQ", "absmax": "bitsandbytes", "quant_map": "bitsandbytes",
    "SCB": "bitsandbytes", "weight_scale_inv": "fp8", "weight_scale_2": "NVIDIA's Model Optimizer",
    "_data": "quanto", "W_q": "HQQ", "codebooks": "AQLM",
}  # fmt: skip


def without_leftovers(base: Checkpoint, parts: Collection[str], quantized: Collection[str]) -> frozenset[str]:
    """The tensors to leave out. CheckpointError for quantized numbers or scales that nothing claims.

    parts: the tensors of quantized weights; quantized: the names of those weights.
    """
    owners = {w.rpartition(".")[0] for w in quantized} | set(quantized)
    rest = {n: t for n, t in base.tensors.items() if n not in parts}
    dead = frozenset(n for n in activation_scales(rest) if quantized and rest[n].dtype not in _SMALL_FLOATS)
    suspects = [n for n, t in rest.items() if n not in dead and _suspicious(n, t, owners)]
    if suspects:
        known = architecture_of(base)
        own = known.numbers(suspects) if known else None
        unclaimed = [n for n in suspects if not _honest(n, rest[n], own)]
        if unclaimed:
            raise _refusal(base, unclaimed, bool(quantized))
    return dead


def activation_scales(names: Iterable[str]) -> list[str]:
    return [n for n in names if _called(n, _DEAD)]


def _suspicious(name: str, info: TensorInfo, owners: Collection[str]) -> bool:
    """owners: the layers that are quantized, in which any scale should have been read."""
    if info.dtype in _SMALL_FLOATS:
        return True
    if info.dtype in _CODES:
        return len(info.shape) > 1 and not _is_buffer(name, info)
    if _called(name, _OF_QUANTIZERS):
        return True
    return name.rpartition(".")[0] in owners and _leaf(name).endswith("scale")


def _is_buffer(name: str, info: TensorInfo) -> bool:
    """Whether old versions of transformers saved such a tensor: positions (1, n), or a mask (1, 1, n, n)."""
    return _leaf(name) in _BUFFERS and (info.shape[0] == 1 or info.shape[0] == info.shape[-1])


def _called(name: str, leaves: Sequence[str]) -> bool:
    leaf = _leaf(name)
    return any(leaf == one or leaf.endswith(f"_{one}") for one in leaves)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _honest(name: str, info: TensorInfo, own: Mapping[str, Numbers] | None) -> bool:
    """Whether the model itself has this tensor, of this kind."""
    if info.dtype in _SMALL_FLOATS:
        return False
    if own is None or own.get(name) == "passed over":  # only its name says what it is
        return info.dtype not in _CODES and not _called(name, _OF_QUANTIZERS)
    return own.get(name) in (("whole",) if info.dtype in _CODES else ("whole", "float"))


def _refusal(base: Checkpoint, names: Sequence[str], quantized: bool) -> CheckpointError:
    infos = [base.tensors[n] for n in names]
    info = min(
        infos, key=lambda t: (t.dtype not in _CODES | _SMALL_FLOATS, "scale" in _leaf(t.name))
    )  # codes before scales
    hint = next((text for end, text in _HINTS.items() if any(n.endswith(end) for n in names)), None)
    number = f"{len(names)} tensors are" if len(names) > 1 else "this tensor is"
    silent = "its quantization_config" if quantized else "config.json"
    return CheckpointError(
        f"{number} quantized numbers or scales, and {silent} does not say what they mean"
        + (f" (they look like {hint})" if hint else "")
        + f": type {info.dtype}, shape {list(info.shape)}",
        where=info.file,
        tensor=info.name,
        expected="every tensor in a float type, or read by the method that quantization_config names",
        next_step="download the folder again with its own config.json, or give the unquantized base as -b",
    )
