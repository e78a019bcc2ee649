"""Rotary embeddings in the builder's graphs: the tables that the model itself computes.

The builder (0.18) has formulas of its own for some kinds of scaling, and ignores the others. A table of cosines and
sines is what its graphs read; here transformers' module for the model makes it.
"""

import copy
import inspect
import sys
from typing import Any

import onnx_ir as ir

from lora_export.errors import ExportError


def take_tables_of_the_model(model: Any) -> None:
    """Let `model`, the builder's base class, ask transformers for its tables, whatever scaling they have."""
    plain_config, plain_init = model.make_config_init, model.make_rope_init
    plain_tables, plain_model = model.make_rotary_embedding_caches_from_scratch, model.make_model

    def make_config_init(self: Any, config: Any) -> None:
        self.unchanged_config = copy.deepcopy(config)  # the builder writes into what it is given
        if longest := _longest(config):
            config.max_position_embeddings = longest
        plain_config(self, config)

    def make_rope_init(self: Any, config: Any) -> None:
        rope = getattr(config, "rope_parameters", None)
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope":
            # what the builder asks for; the tables have their scale in them
            self.rope_attrs["multi_cache"] = {
                "short_factor": 1, "long_factor": 1, "short_mscale": 1.0, "long_mscale": 1.0,
            }  # fmt: skip
        elif isinstance(rope, dict) and rope.get("mrope_section"):
            plain_init(self, config)

    def tables(self: Any) -> Any:
        if self.rope_attrs["op_type"] != "RotaryEmbedding":
            return plain_tables(self)
        made = _tables(
            self.unchanged_config, self.rope_attrs["cache_length"], getattr(self, "rope_layer_type", None)
        )
        return plain_tables(self) if made is None else made

    def make_model(self: Any, path: str) -> None:
        if "multi_cache" in self.rope_attrs and self.rope_attrs["create_caches"]:
            self.make_rotary_embedding_multi_cache()
        plain_model(self, path)

    model.make_config_init, model.make_rope_init = make_config_init, make_rope_init
    model.make_rotary_embedding_caches_from_scratch, model.make_model = tables, make_model


def _longest(config: Any) -> int | None:
    """Positions that YaRN is made for: it is often switched on in a configuration that keeps its length."""
    text = config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") != "yarn":
        return None
    length = int(text.max_position_embeddings)
    return max(length, int(float(rope["factor"]) * int(rope.get("original_max_position_embeddings") or length)))


def compute_tables_that_follow_the_length(model: Any) -> None:
    """Dynamic NTK scaling: beyond the original length the base grows with the text; the graph computes its table.

    A key stays as it was rotated when it came, as in transformers.
    """
    plain = model.make_rotary_embedding_caches

    def make_rotary_embedding_caches(self: Any, **how: Any) -> Any:
        rotary = rotary_of(self.unchanged_config) if self.rope_attrs["op_type"] == "RotaryEmbedding" else None
        if getattr(rotary, "rope_type", None) != "dynamic":
            return plain(self, **how)
        if self.attention_attrs["op_type"] != "GroupQueryAttention":
            raise ExportError(
                "the genai engine writes dynamic rotary embeddings for GroupQueryAttention only",
                expected="another provider or precision, or --engine dynamo",
            )
        if self.rope_attrs["create_caches"]:
            self.rope_attrs["create_caches"] = False
            _compute_tables(self, rotary)
        return "cos_cache", "sin_cache"

    model.make_rotary_embedding_caches = make_rotary_embedding_caches


def _compute_tables(builder: Any, rotary: Any) -> None:
    """cos_cache and sin_cache (tokens, half of what is rotated). Source: transformers' dynamic NTK parameters."""
    rope, original = rotary.config.rope_parameters, float(rotary.original_max_seq_len)
    half, factor = rotary.inv_freq.numel(), float(rope["factor"])

    def node(kind: str, inputs: list[str], what: str, whole: bool = False, **attributes: Any) -> str:
        name = f"/model/dynamic_rope/{what}"
        builder.make_node(kind, inputs=inputs, outputs=[f"{name}/output_0"], name=name, **attributes)
        builder.make_value(f"{name}/output_0", ir.DataType.INT64 if whole else ir.DataType.FLOAT)
        return f"{name}/output_0"

    def number(value: Any, kind: str = "FLOAT") -> str:
        return f"/model/constants/{kind}/{value}"

    mask = "/model/attn_mask_reformat/attn_mask_subgraph"
    longest = node("ReduceMax", [f"{mask}/ReduceSum/output_0"], "Longest", whole=True, keepdims=0)
    length = node("Max", [node("Cast", [longest], "Length", to=ir.DataType.FLOAT), number(original)], "Max")
    scaled = node("Mul", [length, number(factor / original)], "Scaled")
    grown = node("Sub", [scaled, number(factor - 1)], "Grown")
    power = node("Pow", [grown, number(2 * half / (2 * half - 2))], "Power")
    base = node("Mul", [power, number(float(rope["rope_theta"]))], "Base")
    exponents = number([i / half for i in range(half)])
    frequencies = node("Reciprocal", [node("Pow", [base, exponents], "Wavelengths")], "Frequencies")
    ends = [number(0, "INT64"), f"{mask}/Gather/output_0", number(1, "INT64")]
    places = node("Cast", [node("Range", ends, "Range", whole=True)], "Places", to=ir.DataType.FLOAT)
    rows = node("Unsqueeze", [places, number([-1], "INT64")], "Rows")
    angles = node("Mul", [rows, frequencies], "Angles")
    for kind, name in (("Cos", "cos_cache"), ("Sin", "sin_cache")):
        made = node(kind, [angles], kind)
        builder.make_node(
            "Cast", inputs=[made], outputs=[name], name=f"/model/dynamic_rope/{name}", to=builder.io_dtype
        )
        builder.make_value(name, builder.io_dtype, shape=["total_sequence_length", half])


def tables_by_layer_type(model: Any) -> None:
    """Gemma 3: full and sliding attention have each their own table, and scaling."""

    def make_rotary_embedding_multi_cache(self: Any) -> None:
        for kind, name in (("full_attention", "global"), ("sliding_attention", "local")):
            self.rope_attrs["create_caches"], self.rope_layer_type = True, kind
            names = {f"{part}_cache_name": f"{part}_cache_{name}" for part in ("cos", "sin")}
            super(model, self).make_rotary_embedding_caches(**names)
            setattr(self, f"cos_cache_{name}_name", names["cos_cache_name"])
            setattr(self, f"sin_cache_{name}_name", names["sin_cache_name"])

    model.make_rotary_embedding_multi_cache = make_rotary_embedding_multi_cache


def rotate_outside_where_attention_cannot(model: Any) -> None:
    """GroupQueryAttention rotates heads, and parts of them, whose size is a multiple of 16; others get a node of
    their own."""
    plain_fused, plain_packed = model.is_fused_rope_supported, model.is_packed_matmul_supported

    def is_fused_rope_supported(self: Any) -> bool:
        rotated = self.rope_attrs["rotary_embedding_dim"] or self.head_size
        return bool(plain_fused(self)) and not self.head_size % 16 and not rotated % 16

    def is_packed_matmul_supported(self: Any) -> bool:
        split = self.attention_attrs["q_norm"] and self.attention_attrs["k_norm"]
        return bool(plain_packed(self) and (self.is_fused_rope_supported() or split))

    model.is_fused_rope_supported, model.is_packed_matmul_supported = (
        is_fused_rope_supported,
        is_packed_matmul_supported,
    )


def drop_own_scaling(long: Any, yarn: Any) -> None:
    """Phi-3 and gpt-oss have formulas, and names of settings, of their own."""
    long.make_rope_init = lambda self, config: super(long, self).make_rope_init(config)
    yarn.make_rotary_embedding_caches_from_scratch = lambda self: super(
        yarn, self
    ).make_rotary_embedding_caches_from_scratch()


def rotary_of(config: Any) -> Any:
    """transformers' rotary embedding for a decoder's configuration; None if its module has not exactly one."""
    import torch
    import transformers

    cls = getattr(transformers, config.architectures[0], None)
    found = [
        each
        for name, each in vars(sys.modules[cls.__module__]).items()
        if name.endswith("RotaryEmbedding") and "Vision" not in name and issubclass(each, torch.nn.Module)
    ] if cls else []  # fmt: skip
    return found[0](config.get_text_config(decoder=True)) if len(found) == 1 else None


def _tables(config: Any, length: int, layer_type: str | None) -> tuple[Any, Any] | None:
    """Cosines and sines of `length` positions: (length, half of what is rotated) each."""
    import torch

    rotary = rotary_of(config)
    if rotary is None:
        return None
    by_type = "layer_type" in inspect.signature(rotary.forward).parameters
    how = {"layer_type": layer_type} if by_type and layer_type else {}
    name = f"{layer_type}_inv_freq" if how else "inv_freq"
    if not hasattr(rotary, name):
        return None
    cos, sin = rotary(torch.zeros(1), torch.arange(length)[None], **how)
    half = getattr(rotary, name).numel()
    return cos[0, :, :half], sin[0, :, :half]
