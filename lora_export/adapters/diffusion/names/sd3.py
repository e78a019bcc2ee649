"""SD3 and SD3.5 by the names of the original repository."""

from collections.abc import Iterator

from lora_export.adapters.diffusion.names.tables import ADDED_QKV, QKV, Base, Spelling, Swapped, Target, under

CLASSES = frozenset({"SD3Transformer2DModel"})
_BLOCK: dict[str, Target] = {
    "x_block.attn.qkv": under("attn", *QKV),
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn2.qkv": under("attn2", *QKV),
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.attn.qkv": under("attn", *ADDED_QKV),
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
_TOP: dict[str, Target] = {
    "pos_embed": "pos_embed.pos_embed",
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": Swapped("norm_out.linear"),
}


def spellings(base: Base) -> Iterator[Spelling]:
    """The last block drops its text stream, so its modulation of the text is a scale and a shift: swapped."""
    yield from base.blocks("joint_blocks", "transformer_blocks", _BLOCK)
    numbers = base.numbers("transformer_blocks")
    for number in numbers:
        modulation = f"transformer_blocks.{number}.norm1_context.linear"
        last = number == numbers[-1]
        yield from base.table(
            {f"joint_blocks.{number}.context_block.adaLN_modulation.1": Swapped(modulation) if last else modulation}
        )
    yield from base.table(_TOP)
