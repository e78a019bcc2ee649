"""Wan 2.x by the names of the original repository, with VACE's blocks."""

from collections.abc import Iterator

from lora_export.adapters.diffusion.names.tables import Base, Spelling, Target

CLASSES = frozenset(
    {
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
        "WanAnimateTransformer3DModel",
        "SkyReelsV2Transformer3DModel",
    }
)
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_IMAGE = {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}
# diffusers counts the norms in the order of the forward: norm2 and norm3 change places.
_BLOCK: dict[str, Target] = {
    **{f"self_attn.{k}": f"attn1.{v}" for k, v in _ATTENTION.items()},
    **{f"cross_attn.{k}": f"attn2.{v}" for k, v in (_ATTENTION | _IMAGE).items()},
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "norm3": "norm2",
    "modulation": "scale_shift_table",
    "before_proj": "proj_in",
    "after_proj": "proj_out",
}
_TOP: dict[str, Target] = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}


def spellings(base: Base) -> Iterator[Spelling]:
    yield from base.blocks("blocks", "blocks", _BLOCK)
    yield from base.blocks("vace_blocks", "vace_blocks", _BLOCK)
    yield from base.table(_TOP)
