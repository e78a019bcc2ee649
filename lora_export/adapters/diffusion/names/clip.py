"""CLIP's text encoders: with `text_model.` before every name and without, and diffusers' first LoRA names."""

from collections.abc import Iterator

from lora_export.adapters.diffusion.names.tables import Base, Spelling

CLASSES = frozenset({"CLIPTextModel", "CLIPTextModelWithProjection"})
_WRAPPER = "text_model."
_PROJECTIONS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def spellings(base: Base) -> Iterator[Spelling]:
    """Files of transformers 5.6 and newer may lack `text_model.`, where LoRA files always have it."""
    for name in base.modules:
        if pieces := base.pieces(name):
            yield name, pieces
            bare = name.removeprefix(_WRAPPER)
            yield (bare if bare != name else f"{_WRAPPER}{name}"), pieces


def aliases(base: Base) -> Iterator[Spelling]:
    """diffusers 0.15 wrote `self_attn.q_proj.to_q_lora` and `self_attn.to_q_lora`."""
    for name, pieces in spellings(base):
        stem, _, leaf = name.rpartition(".")
        if leaf in _PROJECTIONS and stem.endswith("self_attn"):
            yield f"{stem}.{_PROJECTIONS[leaf]}", pieces
            yield f"{name}.{_PROJECTIONS[leaf]}", pieces
