"""Which weights an adapter file means by which name, written down without the tables of lora_export.

The original UNet names are counted up block by block, as the original code builds its lists; the names of SD3 and
FLUX stand in tables from the original to diffusers. A slow test holds all of them against diffusers' own converters
of checkpoints.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

PEFT_ENDINGS = {
    "lora_down": ".lora_A.weight",
    "lora_up": ".lora_B.weight",
    "lora_up_bias": ".lora_B.bias",
    "magnitude": ".lora_magnitude_vector",
}
KOHYA_ENDINGS = {
    "lora_down": ".lora_down.weight",
    "lora_up": ".lora_up.weight",
    "lora_mid": ".lora_mid.weight",
    "a1": ".a1.weight",
    "a2": ".a2.weight",
    "b1": ".b1.weight",
    "b2": ".b2.weight",
}
OLD_ENDINGS = {"lora_down": "_lora.down.weight", "lora_up": "_lora.up.weight"}
DOTTED_ENDINGS = {"lora_down": ".lora.down.weight", "lora_up": ".lora.up.weight"}
LINEAR_ENDINGS = {"lora_down": ".lora_linear_layer.down.weight", "lora_up": ".lora_linear_layer.up.weight"}
XLABS_ENDINGS = {"lora_down": ".down.weight", "lora_up": ".up.weight"}


@dataclass(frozen=True)
class Site:
    """A trained module: its name in the file, and the modules of the base whose rows it holds, in this order; swap:
    the file's upper half is the base's lower one."""

    component: str
    spelled: str
    targets: tuple[str, ...]
    swap: bool = False
    endings: Mapping[str, str] | None = None


def unet_sites(modules: Iterable[str]) -> Iterator[Site]:
    """diffusers' own names, for any denoiser."""
    for name in modules:
        yield Site("", name, (name,))


_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET_TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def sgm_sites(modules: Iterable[str]) -> Iterator[Site]:
    """The names of the original UNet."""
    known = sorted(modules)

    def block(ours: str, theirs: str, resnet: bool) -> Iterator[Site]:
        for name in known:
            if name.startswith(ours + "."):
                rest = name[len(ours) + 1 :]
                if resnet:
                    rest = next(old for old, new in _RESNET.items() if new == rest)
                yield Site("", f"{theirs}.{rest}", (name,))

    def has(prefix: str) -> bool:
        return any(n.startswith(prefix + ".") for n in known)

    for old, new in _UNET_TOP.items():
        if new in known:
            yield Site("", old, (new,))
    slot, b = 1, 0
    while has(f"down_blocks.{b}"):
        layer = 0
        while has(f"down_blocks.{b}.resnets.{layer}"):
            yield from block(f"down_blocks.{b}.resnets.{layer}", f"input_blocks.{slot}.0", True)
            yield from block(f"down_blocks.{b}.attentions.{layer}", f"input_blocks.{slot}.1", False)
            layer, slot = layer + 1, slot + 1
        if has(f"down_blocks.{b}.downsamplers.0"):
            yield Site("", f"input_blocks.{slot}.0.op", (f"down_blocks.{b}.downsamplers.0.conv",))
            slot += 1
        b += 1
    yield from block("mid_block.resnets.0", "middle_block.0", True)
    yield from block("mid_block.attentions.0", "middle_block.1", False)
    yield from block("mid_block.resnets.1", "middle_block.2", True)
    slot, b = 0, 0
    while has(f"up_blocks.{b}"):
        layer, after = 0, 1
        while has(f"up_blocks.{b}.resnets.{layer}"):
            yield from block(f"up_blocks.{b}.resnets.{layer}", f"output_blocks.{slot}.0", True)
            yield from block(f"up_blocks.{b}.attentions.{layer}", f"output_blocks.{slot}.1", False)
            after = 2 if has(f"up_blocks.{b}.attentions.{layer}") else 1
            layer, slot = layer + 1, slot + 1
        if has(f"up_blocks.{b}.upsamplers.0"):
            yield Site("", f"output_blocks.{slot - 1}.{after}.conv", (f"up_blocks.{b}.upsamplers.0.conv",))
        b += 1


_FLUX_DOUBLE = {
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
_FLUX_SINGLE = {
    "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
    "linear2": "proj_out",
    "modulation.lin": "norm.linear",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
_FLUX_TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_SD3_BLOCK = {
    "x_block.attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "context_block.attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.proj": "attn2.to_out.0",
    "context_block.attn.proj": "attn.to_add_out",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
}
_SD3_TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_XLABS = {
    "double_blocks.{i}.processor.qkv_lora1": "attn.to_q attn.to_k attn.to_v",
    "double_blocks.{i}.processor.qkv_lora2": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "double_blocks.{i}.processor.proj_lora1": "attn.to_out.0",
    "double_blocks.{i}.processor.proj_lora2": "attn.to_add_out",
    "single_blocks.{i}.processor.qkv_lora": "attn.to_q attn.to_k attn.to_v",
    "single_blocks.{i}.processor.proj_lora": "proj_out",
}


def _blocks(
    known: frozenset[str], table: Mapping[str, str], theirs: str, ours: str, last_swap: str | None = None
) -> Iterator[Site]:
    count = 1 + max(int(n.split(".")[1]) for n in known if n.startswith(ours + "."))
    for i in range(count):
        for old, new in table.items():
            targets = tuple(f"{ours}.{i}.{n}" for n in new.split())
            if set(targets) <= known:
                yield Site("", f"{theirs}.{i}.{old}", targets, swap=old == last_swap and i == count - 1)


def _top(known: frozenset[str], table: Mapping[str, str]) -> Iterator[Site]:
    for old, new in table.items():
        if new in known:
            yield Site("", old, (new,), swap=old == "final_layer.adaLN_modulation.1")


def flux_sites(modules: Iterable[str]) -> Iterator[Site]:
    """The names of Black Forest Labs' own FLUX.1."""
    known = frozenset(modules)
    yield from _blocks(known, _FLUX_DOUBLE, "double_blocks", "transformer_blocks")
    yield from _blocks(known, _FLUX_SINGLE, "single_blocks", "single_transformer_blocks")
    yield from _top(known, _FLUX_TOP)


def sd3_sites(modules: Iterable[str]) -> Iterator[Site]:
    """The names of Stability's own SD3; halves change places in the last block's context and at the end."""
    known = frozenset(modules)
    yield from _blocks(known, _SD3_BLOCK, "joint_blocks", "transformer_blocks", "context_block.adaLN_modulation.1")
    yield from _top(known, _SD3_TOP)


def xlabs_sites(modules: Iterable[str]) -> Iterator[Site]:
    """XLabs' processors of FLUX: 1 is the picture's stream, 2 the text's."""
    known = frozenset(modules)
    for old, new in _XLABS.items():
        ours = "transformer_blocks" if old.startswith("double") else "single_transformer_blocks"
        for i in range(1 + max(int(n.split(".")[1]) for n in known if n.startswith(ours + "."))):
            yield Site("", old.format(i=i), tuple(f"{ours}.{i}.{n}" for n in new.split()), endings=XLABS_ENDINGS)


def old_sites(modules: Iterable[str]) -> Iterator[Site]:
    """Attention processors, as diffusers saved them up to 0.20: without the `.0` of `to_out.0`."""
    for name in sorted(modules):
        stem, _, leaf = name.removesuffix(".0").rpartition(".")
        if leaf in ("to_q", "to_k", "to_v", "to_out") and stem.endswith(("attn1", "attn2")):
            yield Site("", f"{stem}.processor.{leaf}", (name,), endings=OLD_ENDINGS)


def text_sites(modules: Iterable[str], clip: bool) -> Iterator[Site]:
    """A text encoder, as files always name it: CLIP's with `text_model`, whether the base has that or not."""
    for name in sorted(modules):
        spelled = name.removeprefix("text_model.")
        if clip and spelled != "text_projection":
            spelled = f"text_model.{spelled}"
        yield Site("", spelled, (name,))
