"""AuraFlow by the names of the original repository."""

from collections.abc import Iterator

from lora_export.adapters.diffusion.names.tables import Base, Spelling, Swapped, Target

CLASSES = frozenset({"AuraFlowTransformer2DModel"})
_MLP = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}
_OWN = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
_TEXT = {"q": "add_q_proj", "k": "add_k_proj", "v": "add_v_proj", "o": "to_add_out"}
_DOUBLE: dict[str, Target] = {
    **{f"mlpX.{k}": f"ff.{v}" for k, v in _MLP.items()},
    **{f"mlpC.{k}": f"ff_context.{v}" for k, v in _MLP.items()},
    **{f"attn.w2{k}": f"attn.{v}" for k, v in _OWN.items()},
    **{f"attn.w1{k}": f"attn.{v}" for k, v in _TEXT.items()},
    "modX.1": "norm1.linear",
    "modC.1": "norm1_context.linear",
}
_SINGLE: dict[str, Target] = {
    **{f"mlp.{k}": f"ff.{v}" for k, v in _MLP.items()},
    **{f"attn.w1{k}": f"attn.{v}" for k, v in _OWN.items()},
    "modCX.1": "norm1.linear",
}
_TOP: dict[str, Target] = {
    "t_embedder.mlp.0": "time_step_proj.linear_1",
    "t_embedder.mlp.2": "time_step_proj.linear_2",
    "cond_seq_linear": "context_embedder",
    "positional_encoding": "pos_embed.pos_embed",
    "init_x_linear": "pos_embed.proj",
    "final_linear": "proj_out",
    "modF.1": Swapped("norm_out.linear"),
}


def spellings(base: Base) -> Iterator[Spelling]:
    yield from base.blocks("double_layers", "joint_transformer_blocks", _DOUBLE)
    yield from base.blocks("single_layers", "single_transformer_blocks", _SINGLE)
    yield from base.table(_TOP)
