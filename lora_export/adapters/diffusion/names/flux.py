"""FLUX.1 and Chroma by the names of the original repository, and XLabs' names of its attention processors."""

from collections.abc import Iterator

from lora_export.adapters.diffusion.names.tables import ADDED_QKV, QKV, Base, Spelling, Swapped, Target, under

CLASSES = frozenset({"FluxTransformer2DModel", "ChromaTransformer2DModel"})
_IMAGE, _TEXT = under("attn", *QKV), under("attn", *ADDED_QKV)
_DOUBLE: dict[str, Target] = {
    "img_attn.qkv": _IMAGE,
    "img_attn.proj": "attn.to_out.0",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "img_mod.lin": "norm1.linear",
    "txt_attn.qkv": _TEXT,
    "txt_attn.proj": "attn.to_add_out",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "txt_mod.lin": "norm1_context.linear",
    "processor.qkv_lora1": _IMAGE,
    "processor.qkv_lora2": _TEXT,
    "processor.proj_lora1": "attn.to_out.0",
    "processor.proj_lora2": "attn.to_add_out",
}
_SINGLE: dict[str, Target] = {
    "linear1": (*_IMAGE, "proj_mlp"),
    "linear2": "proj_out",
    "modulation.lin": "norm.linear",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
    "processor.qkv_lora": _IMAGE,
    "processor.proj_lora": "proj_out",
}
_TOP: dict[str, Target] = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": Swapped("norm_out.linear"),
}
# Chroma computes all modulations from one small network.
_GUIDANCE: dict[str, Target] = {"in_layer": "linear_1", "out_layer": "linear_2"}


def spellings(base: Base) -> Iterator[Spelling]:
    yield from base.blocks("double_blocks", "transformer_blocks", _DOUBLE)
    yield from base.blocks("single_blocks", "single_transformer_blocks", _SINGLE)
    yield from base.table(_TOP)
    yield from base.blocks("distilled_guidance_layer.layers", "distilled_guidance_layer.layers", _GUIDANCE)
