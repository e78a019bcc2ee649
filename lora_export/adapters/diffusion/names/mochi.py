"""Mochi by the names of the original repository. Its gated feed-forward stores the gate first, diffusers last."""

from collections.abc import Iterator

from lora_export.adapters.diffusion.names.tables import ADDED_QKV, QKV, Base, Spelling, Swapped, Target, under

CLASSES = frozenset({"MochiTransformer3DModel"})
_BLOCK: dict[str, Target] = {
    "mod_x": "norm1.linear",
    "mod_y": "norm1_context.linear",
    "attn.qkv_x": under("attn1", *QKV),
    "attn.qkv_y": under("attn1", *ADDED_QKV),
    "attn.q_norm_x": "attn1.norm_q",
    "attn.k_norm_x": "attn1.norm_k",
    "attn.q_norm_y": "attn1.norm_added_q",
    "attn.k_norm_y": "attn1.norm_added_k",
    "attn.proj_x": "attn1.to_out.0",
    "attn.proj_y": "attn1.to_add_out",
    "mlp_x.w1": Swapped("ff.net.0.proj"),
    "mlp_x.w2": "ff.net.2",
    "mlp_y.w1": Swapped("ff_context.net.0.proj"),
    "mlp_y.w2": "ff_context.net.2",
}
_LAST: dict[str, Target] = {"mod_y": "norm1_context.linear_1"}
_TOP: dict[str, Target] = {
    "x_embedder.proj": "patch_embed.proj",
    "t_embedder.mlp.0": "time_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_embed.timestep_embedder.linear_2",
    **{f"t5_y_embedder.{name}": f"time_embed.pooler.{name}" for name in ("to_q", "to_kv", "to_out")},
    "t5_yproj": "time_embed.caption_proj",
    "final_layer.mod": Swapped("norm_out.linear"),
    "final_layer.linear": "proj_out",
}


def spellings(base: Base) -> Iterator[Spelling]:
    for parts in (_BLOCK, _LAST):  # the last block's modulation of the text has another name in diffusers
        yield from base.blocks("blocks", "transformer_blocks", parts)
    yield from base.table(_TOP)
