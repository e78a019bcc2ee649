"""Names that every model has: its own, and those that diffusers' attention processors had."""

from collections.abc import Iterator

from lora_export.adapters.diffusion.names.tables import Base, Spelling

_ATTENTION = frozenset(("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"))


def spellings(base: Base) -> Iterator[Spelling]:
    for name in (*base.modules, *base.parameters):
        if pieces := base.pieces(name):
            yield name, pieces


def aliases(base: Base) -> Iterator[Spelling]:
    """Before 0.21 diffusers kept LoRA in processors (`attn1.processor.to_q_lora`), and `to_out.0` was `to_out`."""
    for name in base.modules:
        stem, _, leaf = name.removesuffix(".0").rpartition(".")
        if (f"{leaf}.0" if name.endswith(".0") else leaf) not in _ATTENTION:
            continue
        pieces = base.pieces(name)
        if pieces is None:
            continue
        for last in {leaf, name.removeprefix(f"{stem}.")}:
            yield f"{stem}.{last}", pieces
            yield f"{stem}.processor.{last}", pieces
