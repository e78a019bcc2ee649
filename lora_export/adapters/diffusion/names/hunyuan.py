"""HunyuanVideo and HunyuanImage by the names of their original repositories.

HunyuanVideo fuses q, k and v; HunyuanImage and HunyuanVideo 1.5 do not.
"""

from collections.abc import Iterator

from lora_export.adapters.diffusion.names.tables import ADDED_QKV, QKV, Base, Spelling, Swapped, Target, under

CLASSES = frozenset(
    {
        "HunyuanVideoTransformer3DModel",
        "HunyuanVideoFramepackTransformer3DModel",
        "HunyuanVideo15Transformer3DModel",
        "HunyuanImageTransformer2DModel",
    }
)
_DOUBLE: dict[str, Target] = {
    "img_attn_qkv": under("attn", *QKV),
    **{f"img_attn_{letter}": f"attn.to_{letter}" for letter in "qkv"},
    "img_attn_proj": "attn.to_out.0",
    "img_attn_q_norm": "attn.norm_q",
    "img_attn_k_norm": "attn.norm_k",
    "img_mod.linear": "norm1.linear",
    "img_mlp.fc1": "ff.net.0.proj",
    "img_mlp.fc2": "ff.net.2",
    "txt_attn_qkv": under("attn", *ADDED_QKV),
    **{f"txt_attn_{letter}": f"attn.add_{letter}_proj" for letter in "qkv"},
    "txt_attn_proj": "attn.to_add_out",
    "txt_attn_q_norm": "attn.norm_added_q",
    "txt_attn_k_norm": "attn.norm_added_k",
    "txt_mod.linear": "norm1_context.linear",
    "txt_mlp.fc1": "ff_context.net.0.proj",
    "txt_mlp.fc2": "ff_context.net.2",
}
_SINGLE: dict[str, Target] = {
    "linear1": (*under("attn", *QKV), "proj_mlp"),
    **{f"linear1_{letter}": f"attn.to_{letter}" for letter in "qkv"},
    "linear1_mlp": "proj_mlp",
    "linear2": "proj_out",
    "linear2.fc": "proj_out",
    "q_norm": "attn.norm_q",
    "k_norm": "attn.norm_k",
    "modulation.linear": "norm.linear",
}
_REFINER: dict[str, Target] = {
    "norm1": "norm1",
    "norm2": "norm2",
    "self_attn_qkv": under("attn", *QKV),
    **{f"self_attn_{letter}": f"attn.to_{letter}" for letter in "qkv"},
    "self_attn_proj": "attn.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm_out.linear",
}
_TOP: dict[str, Target] = {
    "img_in.proj": "x_embedder.proj",
    "txt_in.input_embedder": "context_embedder.proj_in",
    "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
    "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": Swapped("norm_out.linear"),
}
# The module that holds the embedders of the timestep and of the guidance has a name in each model.
_EMBEDDERS = ("time_text_embed", "time_guidance_embed", "time_embed")


def spellings(base: Base) -> Iterator[Spelling]:
    yield from base.blocks("double_blocks", "transformer_blocks", _DOUBLE)
    yield from base.blocks("single_blocks", "single_transformer_blocks", _SINGLE)
    yield from base.blocks(
        "txt_in.individual_token_refiner.blocks", "context_embedder.token_refiner.refiner_blocks", _REFINER
    )
    yield from base.table(_TOP)
    for embedder in _EMBEDDERS:
        for theirs, ours in (("time_in", "timestep_embedder"), ("guidance_in", "guidance_embedder")):
            stem = f"{embedder}.{ours}"
            yield from base.table({f"{theirs}.mlp.0": f"{stem}.linear_1", f"{theirs}.mlp.2": f"{stem}.linear_2"})
