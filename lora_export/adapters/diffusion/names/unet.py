"""UNets of SD 1.x, 2.x and SDXL by the names of the original repository (sgm).

Blocks are numbered through there: `down_blocks.1.attentions.0` is `input_blocks.4.1` where each block has two
layers. How many a block has is seen in the base.
"""

from collections.abc import Iterator

from lora_export.adapters.diffusion.names.tables import Base, Spelling, renamed

CLASSES = frozenset({"UNet2DConditionModel"})
_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def spellings(base: Base) -> Iterator[Spelling]:
    stems = dict(_stems(base))

    def rename(name: str) -> str:
        if name in _TOP:
            return _TOP[name]
        depth = 3 if name.startswith("mid_block.") else 4
        words = name.split(".")
        stem, rest = ".".join(words[:depth]), ".".join(words[depth:])
        if stem not in stems:
            return name
        if ".resnets." in stem:
            return f"{stems[stem]}.{_RESNET[rest]}" if rest in _RESNET else name
        if ".downsamplers." in stem:
            rest = "op"
        return f"{stems[stem]}.{rest}"

    return renamed(base, rename)


def _stems(base: Base) -> Iterator[tuple[str, str]]:
    """diffusers' resnets, attentions and samplers, and what the original calls them."""
    yield "mid_block.resnets.0", "middle_block.0"
    yield "mid_block.attentions.0", "middle_block.1"
    yield "mid_block.resnets.1", "middle_block.2"
    at = 1
    for number in base.numbers("down_blocks"):
        block = f"down_blocks.{number}"
        for layer in base.numbers(f"{block}.resnets"):
            yield f"{block}.resnets.{layer}", f"input_blocks.{at}.0"
            yield f"{block}.attentions.{layer}", f"input_blocks.{at}.1"
            at += 1
        if base.numbers(f"{block}.downsamplers"):
            yield f"{block}.downsamplers.0", f"input_blocks.{at}.0"
            at += 1
    at = 0
    for number in base.numbers("up_blocks"):
        block = f"up_blocks.{number}"
        attends = bool(base.numbers(f"{block}.attentions"))
        for layer in base.numbers(f"{block}.resnets"):
            yield f"{block}.resnets.{layer}", f"output_blocks.{at}.0"
            yield f"{block}.attentions.{layer}", f"output_blocks.{at}.1"
            at += 1
        if base.numbers(f"{block}.upsamplers"):
            yield f"{block}.upsamplers.0", f"output_blocks.{at - 1}.{2 if attends else 1}"
