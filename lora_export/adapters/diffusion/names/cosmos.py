"""Cosmos-Predict2, and Anima that is made of it, by the names of the original repository."""

from collections.abc import Iterator

from lora_export.adapters.diffusion.names.tables import Base, Spelling, Target

CLASSES = frozenset({"CosmosTransformer3DModel"})
_ATTENTION = {
    "q_proj": "to_q",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "output_proj": "to_out.0",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}
_MODULATED = (("self_attn", "norm1"), ("cross_attn", "norm2"), ("mlp", "norm3"))
_BLOCK: dict[str, Target] = {
    **{f"self_attn.{k}": f"attn1.{v}" for k, v in _ATTENTION.items()},
    **{f"cross_attn.{k}": f"attn2.{v}" for k, v in _ATTENTION.items()},
    **{f"adaln_modulation_{part}.{i}": f"{norm}.linear_{i}" for part, norm in _MODULATED for i in (1, 2)},
    "mlp.layer1": "ff.net.0.proj",
    "mlp.layer2": "ff.net.2",
}
_TOP: dict[str, Target] = {
    "x_embedder.proj.1": "patch_embed.proj",
    "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
    "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
    "t_embedding_norm": "time_embed.norm",
    "final_layer.adaln_modulation.1": "norm_out.linear_1",
    "final_layer.adaln_modulation.2": "norm_out.linear_2",
    "final_layer.linear": "proj_out",
}


def spellings(base: Base) -> Iterator[Spelling]:
    yield from base.blocks("blocks", "transformer_blocks", _BLOCK)
    yield from base.table(_TOP)
