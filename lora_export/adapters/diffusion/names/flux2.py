"""FLUX.2 by the names of the original repository; its single blocks are fused in diffusers, too."""

from collections.abc import Iterator

from lora_export.adapters.diffusion.names.tables import ADDED_QKV, QKV, Base, Spelling, Swapped, Target, under

CLASSES = frozenset({"Flux2Transformer2DModel"})
_DOUBLE: dict[str, Target] = {
    "img_attn.qkv": under("attn", *QKV),
    "img_attn.proj": "attn.to_out.0",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_attn.qkv": under("attn", *ADDED_QKV),
    "txt_attn.proj": "attn.to_add_out",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
_SINGLE: dict[str, Target] = {
    "linear1": "attn.to_qkv_mlp_proj",
    "linear2": "attn.to_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
_TOP: dict[str, Target] = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": Swapped("norm_out.linear"),
}


def spellings(base: Base) -> Iterator[Spelling]:
    yield from base.blocks("double_blocks", "transformer_blocks", _DOUBLE)
    yield from base.blocks("single_blocks", "single_transformer_blocks", _SINGLE)
    yield from base.table(_TOP)
