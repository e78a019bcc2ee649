"""Lumina-Image 2.0 and Z-Image by the names of the original repository.

Lumina's heads are grouped, so its q is higher than its k and v: the rows are those of the base's own weights.
"""

from collections.abc import Iterator

from lora_export.adapters.diffusion.names.tables import QKV, Base, Spelling, Target, under

CLASSES = frozenset({"Lumina2Transformer2DModel", "ZImageTransformer2DModel"})
_LISTS = ("noise_refiner", "context_refiner", "layers")
_LUMINA: dict[str, Target] = {
    "attention.qkv": under("attn", *QKV),
    "attention.out": "attn.to_out.0",
    "attention.q_norm": "attn.norm_q",
    "attention.k_norm": "attn.norm_k",
    "feed_forward.w1": "feed_forward.linear_1",
    "feed_forward.w2": "feed_forward.linear_2",
    "feed_forward.w3": "feed_forward.linear_3",
    "attention_norm2": "norm2",
    "adaLN_modulation.1": "norm1.linear",
}
_LUMINA_TOP: dict[str, Target] = {
    "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
    "cap_embedder.0": "time_caption_embed.caption_embedder.0",
    "cap_embedder.1": "time_caption_embed.caption_embedder.1",
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    "final_layer.linear": "norm_out.linear_2",
}
_Z: dict[str, Target] = {
    "attention.qkv": under("attention", *QKV),
    "attention.out": "attention.to_out.0",
    "attention.q_norm": "attention.norm_q",
    "attention.k_norm": "attention.norm_k",
}


def spellings(base: Base) -> Iterator[Spelling]:
    z_image = base.class_name.startswith("ZImage")
    for stem in _LISTS:
        yield from base.blocks(stem, stem, _Z if z_image else _LUMINA)
        if not z_image:  # a norm with a modulation is one module, a norm without is the module itself
            for norm in ("norm1.norm", "norm1"):
                yield from base.blocks(stem, stem, {"attention_norm1": norm})
    yield from _z_tops(base) if z_image else base.table(_LUMINA_TOP)


def _z_tops(base: Base) -> Iterator[Spelling]:
    """diffusers keeps the first and the last layer of Z-Image for each size of a patch."""
    for ours in ("all_x_embedder", "all_final_layer"):
        for name in base.modules:
            stem, _, rest = name.partition(".")
            _size, _, inner = rest.partition(".")
            pieces = base.pieces(name)
            if stem == ours and pieces:
                yield f"{ours.removeprefix('all_')}{inner and f'.{inner}'}", pieces
