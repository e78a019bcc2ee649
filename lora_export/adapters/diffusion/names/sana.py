"""Sana by the names of the original repository."""

from collections.abc import Iterator

from lora_export.adapters.diffusion.names.tables import QKV, Base, Spelling, Target, under

CLASSES = frozenset({"SanaTransformer2DModel"})
_BLOCK: dict[str, Target] = {
    "scale_shift_table": "scale_shift_table",
    "attn.qkv": under("attn1", *QKV),
    "attn.proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": "attn2.to_out.0",
    "mlp.inverted_conv.conv": "ff.conv_inverted",
    "mlp.depth_conv.conv": "ff.conv_depth",
    "mlp.point_conv.conv": "ff.conv_point",
}
_TOP: dict[str, Target] = {
    "x_embedder.proj": "patch_embed.proj",
    "t_embedder.mlp.0": "time_embed.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_embed.emb.timestep_embedder.linear_2",
    "t_block.1": "time_embed.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "attention_y_norm": "caption_norm",
    "final_layer.linear": "proj_out",
    "final_layer.scale_shift_table": "scale_shift_table",
}


def spellings(base: Base) -> Iterator[Spelling]:
    yield from base.blocks("blocks", "transformer_blocks", _BLOCK)
    yield from base.table(_TOP)
