"""Adapter files with one fault each: what is done to a good file of the tiny SD 1.5, what the refusal must name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

BLOCK = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
Q, K, PROJ = f"{BLOCK}_attn1_to_q", f"{BLOCK}_attn1_to_k", "lora_unet_down_blocks_0_attentions_0_proj_in"
CONV, NORM = "lora_unet_down_blocks_0_resnets_0_conv1", f"{BLOCK}_norm1"
OWN_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TE = "lora_te_text_model_encoder_layers_0_mlp_fc1"


@dataclass
class File:
    """The tensors and the metadata of an adapter file, to be changed."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)

    def rename(self, old: str, new: str) -> None:
        """Tensors whose name begins with `old`."""
        found = [n for n in self.tensors if n.startswith(old)]
        assert found, old
        for name in found:
            self.tensors[new + name[len(old) :]] = self.tensors.pop(name)

    def drop(self, start: str) -> None:
        found = [n for n in self.tensors if n.startswith(start)]
        assert found, start
        for name in found:
            del self.tensors[name]

    def only(self, **parts: Tensor) -> None:
        """Nothing but these tensors of the module Q; underscores at the start of a part stand for none."""
        self.tensors = {f"{Q}.{part}": value for part, value in parts.items()}


def good() -> File:
    """A LoRA of rank 2 on six modules of SD 1.5."""
    generator = torch.Generator().manual_seed(0)
    sizes = {Q: (32, 32), K: (32, 32), TE: (64, 32), f"{BLOCK}_ff_net_2": (32, 128)}
    tensors = {}
    for name, (out, inner) in sizes.items():
        tensors |= {
            f"{name}.lora_down.weight": torch.randn(2, inner, generator=generator) / inner**0.5,
            f"{name}.lora_up.weight": torch.randn(out, 2, generator=generator) * 0.1,
            f"{name}.alpha": torch.tensor(1.0),
        }
    for name, kernel in ((PROJ, 1), (CONV, 3)):
        tensors |= {
            f"{name}.lora_down.weight": torch.randn(2, 32, kernel, kernel, generator=generator) / 6,
            f"{name}.lora_up.weight": torch.randn(32, 2, 1, 1, generator=generator) * 0.1,
            f"{name}.alpha": torch.tensor(1.0),
        }
    return File(tensors, {"ss_network_module": "networks.lora"})


def ones(*shape: int, value: float = 0.1) -> Tensor:
    return torch.full(shape, value)


def pair(name: str, out: int = 32, inner: int = 32) -> dict[str, Tensor]:
    return {f"{name}.lora_down.weight": ones(2, inner), f"{name}.lora_up.weight": ones(out, 2)}


Change = Callable[[File], object]


@dataclass(frozen=True)
class Broken:
    """change: of a good file; named: each stands in the refusal; weight: the adapter's factor; more: options."""

    change: Change
    named: tuple[str, ...]
    weight: float = 1.0
    more: tuple[str, ...] = ()


def _set(name: str, value: Tensor) -> Change:
    return lambda f: f.tensors.__setitem__(name, value)


def _replace(tensors: Mapping[str, Tensor]) -> Change:
    def change(file: File) -> None:
        file.tensors = dict(tensors)

    return change


def _only(**parts: Tensor) -> Change:
    return lambda f: f.only(**parts)


def _grow(file: File, **parts: Tensor) -> None:
    file.tensors |= {f"{Q}.{part}": value for part, value in parts.items()}


_LOHA = {
    "hada_w1_a": ones(32, 2),
    "hada_w1_b": ones(2, 32),
    "hada_w2_a": ones(32, 2),
    "hada_w2_b": ones(2, 32),
}
_OFT = {"oft_blocks": ones(8, 4, 4).tril(), "alpha": torch.tensor(0.0)}
_IA3 = {"weight": ones(32), "on_input": torch.tensor(0)}
_GLORA = {"a1.weight": ones(32, 2), "a2.weight": ones(2, 32), "b1.weight": ones(32, 2), "b2.weight": ones(2, 32)}
_UNKNOWN = "lora_unet_down_blocks_7_attentions_0_proj_in"
_SGM = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"

BROKEN: dict[str, Broken] = {
    # names
    "renamed module": Broken(lambda f: f.rename(Q, f"{BLOCK}_attn1_to_x"), (f"{BLOCK}_attn1_to_x",)),
    "renamed ending": Broken(lambda f: f.rename(f"{Q}.lora_up", f"{Q}.lora_upp"), (f"{Q}.lora_upp.weight",)),
    "up is missing": Broken(lambda f: f.drop(f"{Q}.lora_up"), (Q,)),
    "down is missing": Broken(lambda f: f.drop(f"{K}.lora_down"), (K,)),
    "alpha alone": Broken(lambda f: [f.drop(f"{K}.lora_{x}") for x in ("up", "down")], (K,)),
    "second text encoder": Broken(lambda f: f.rename("lora_te_", "lora_te2_"), ("lora_te2_", "text encoder")),
    "third text encoder": Broken(lambda f: f.rename("lora_te_", "lora_te3_"), ("lora_te3_",)),
    "layer that the text encoder has not": Broken(
        lambda f: f.rename(TE, TE.replace("layers_0", "layers_7")), ("layers_7_mlp_fc1",)
    ),
    "unknown block": Broken(lambda f: f.tensors.update(pair(_UNKNOWN)), (_UNKNOWN,)),
    "extra tensor": Broken(_set("training_step", ones(1)), ("training_step",)),
    "extra part": Broken(_set(f"{Q}.lora_sideways.weight", ones(2, 32)), (f"{Q}.lora_sideways.weight",)),
    "module of the text encoder under the UNet": Broken(
        lambda f: f.rename("lora_te_", "lora_unet_"), ("lora_unet_text_model_encoder_layers_0_mlp_fc1",)
    ),
    "two spellings of one weight": Broken(
        lambda f: f.tensors.update(pair("lora_unet_input_blocks_1_1_proj_in")), ("proj_in",)
    ),
    "the same weight twice, by two trainers": Broken(
        lambda f: f.tensors.update(
            {f"unet.{OWN_Q}.lora_A.weight": ones(2, 32), f"unet.{OWN_Q}.lora_B.weight": ones(32, 2)}
        ),
        ("attn1.to_q",),
    ),
    # alphas
    "alpha 0": Broken(_set(f"{Q}.alpha", torch.tensor(0.0)), (f"{Q}.alpha",)),
    "alpha not a number": Broken(_set(f"{Q}.alpha", torch.tensor(float("nan"))), (f"{Q}.alpha",)),
    "alpha infinite": Broken(_set(f"{Q}.alpha", torch.tensor(float("inf"))), (f"{Q}.alpha",)),
    "alpha negative": Broken(_set(f"{Q}.alpha", torch.tensor(-1.0)), (f"{Q}.alpha",)),
    "alpha of two numbers": Broken(_set(f"{Q}.alpha", ones(2)), (f"{Q}.alpha",)),
    # shapes
    "down of too many inputs": Broken(_set(f"{Q}.lora_down.weight", ones(2, 33)), (Q,)),
    "up of too few rows": Broken(_set(f"{Q}.lora_up.weight", ones(31, 2)), (Q,)),
    "ranks of up and down differ": Broken(_set(f"{Q}.lora_up.weight", ones(32, 3)), (Q,)),
    "down of one dimension": Broken(_set(f"{Q}.lora_down.weight", ones(64)), (Q,)),
    "kernel of another size": Broken(_set(f"{CONV}.lora_down.weight", ones(2, 32, 5, 5)), (CONV,)),
    "lora_mid of another rank": Broken(_set(f"{CONV}.lora_mid.weight", ones(3, 2, 3, 3)), (CONV,)),
    "dora_scale of neither axis": Broken(_set(f"{Q}.dora_scale", ones(31, 1)), (f"{Q}.dora_scale",)),
    "dora_scale alone": Broken(_only(dora_scale=ones(32, 1)), (Q,)),
    "numbers that are whole": Broken(_set(f"{Q}.lora_up.weight", ones(32, 2).int()), (f"{Q}.lora_up.weight",)),
    "numbers that are none": Broken(
        lambda f: f.tensors[f"{Q}.lora_up.weight"].__setitem__((3, 1), float("nan")), (f"{Q}.lora_up.weight",)
    ),
    # other kinds
    "LoHa, half": Broken(_only(**{k: v for k, v in _LOHA.items() if k != "hada_w2_b"}), (Q, "hada_w2_b")),
    "LoHa of other columns": Broken(_only(**{**_LOHA, "hada_w1_b": ones(2, 31)}), (Q,)),
    "LoHa with one core": Broken(_only(**_LOHA, hada_t1=ones(2, 2, 3, 3)), (Q,)),
    "LoKr, first factor alone": Broken(_only(lokr_w1=ones(4, 4)), (Q,)),
    "LoKr, first factor twice": Broken(
        _only(lokr_w1=ones(4, 4), lokr_w1_a=ones(4, 2), lokr_w1_b=ones(2, 4), lokr_w2=ones(8, 8)), (Q,)
    ),
    "LoKr of another size": Broken(_only(lokr_w1=ones(4, 4), lokr_w2=ones(8, 7)), (Q,)),
    "LoRA and LoHa of one module": Broken(lambda f: _grow(f, **_LOHA), (Q,)),
    "GLoRA, half": Broken(_only(**{k: v for k, v in _GLORA.items() if k[:2] != "b1"}), (Q,)),
    "IA3 of another length": Broken(_only(weight=ones(31), on_input=torch.tensor(0)), (Q,)),
    "IA3 on neither side": Broken(_only(weight=ones(32), on_input=torch.tensor(2)), (Q, "on_input")),
    "IA3 without a side": Broken(_only(weight=ones(32)), (Q,)),
    "OFT of too few rows": Broken(_only(oft_blocks=ones(7, 4, 4), alpha=torch.tensor(0.0)), (Q,)),
    "OFT of oblong blocks": Broken(_only(oft_blocks=ones(8, 4, 3), alpha=torch.tensor(0.0)), (Q,)),
    "BOFT with too many turns": Broken(_only(oft_blocks=ones(9, 8, 4, 4), alpha=torch.tensor(0.0)), (Q,)),
    "diff of another shape": Broken(_only(diff=ones(32, 31)), (f"{Q}.diff",)),
    "diff_b without a bias": Broken(_set(f"{Q}.diff_b", ones(32)), (f"{Q}.diff_b",)),
    "norm of another length": Broken(
        _replace({f"{NORM}.w_norm": ones(31), f"{NORM}.b_norm": ones(32)}), (f"{NORM}.w_norm",)
    ),
    # factors that not every tool agrees on
    "DoRA at half strength": Broken(_set(f"{Q}.dora_scale", ones(32, 1)), (Q,), 0.5),
    "IA3 at half strength": Broken(_only(**_IA3), (Q,), 0.5),
    "OFT at double strength": Broken(_only(**_OFT), (Q,), 2.0),
    "set at half strength": Broken(_only(set_weight=ones(32, 32)), (Q,), 0.5),
    # files of another nature
    "IP-Adapter": Broken(
        _replace({"image_proj.proj.weight": ones(4, 4), "ip_adapter.1.to_k_ip.weight": ones(4, 4)}), ("IP-Adapter",)
    ),
    "ControlNet": Broken(
        _replace(
            {
                "controlnet_cond_embedding.conv_in.weight": ones(4, 3, 3, 3),
                "controlnet_mid_block.weight": ones(4, 4),
            }
        ),
        ("ControlNet",),
    ),
    "ControlNet in its original form": Broken(
        _replace({"control_model.input_hint_block.0.weight": ones(4, 3, 3, 3)}), ("ControlNet",)
    ),
    "control-LoRA of SDXL": Broken(
        _replace(
            {"lora_controlnet": ones(1), "input_blocks.1.0.down": ones(2, 4), "input_blocks.1.0.up": ones(4, 2)}
        ),
        ("lora_controlnet",),
    ),
    "LLLite": Broken(
        _replace(
            {"lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.conditioning1.0.weight": ones(4, 4)}
        ),
        ("LLLite",),
    ),
    "hypernetwork": Broken(
        _replace({"768.0.linear.0.weight": ones(4, 4), "768.0.linear.0.bias": ones(4)}), ("768.0.linear.0",)
    ),
    "embedding of another width": Broken(_replace({"emb_params": ones(2, 31)}), ("emb_params",)),
    "embedding of SDXL": Broken(_replace({"clip_l": ones(2, 32), "clip_g": ones(2, 32)}), ("clip_",)),
    "a whole UNet": Broken(
        _replace({f"{OWN_Q}.weight": ones(32, 32), "conv_in.weight": ones(32, 4, 3, 3)}), (".weight",)
    ),
    "nothing": Broken(lambda f: f.tensors.clear(), ("adapter.safetensors",)),
    # another family's
    "LoRA of SDXL": Broken(_replace(pair(_SGM, 64, 64)), (_SGM,)),
    "LoRA of FLUX": Broken(_replace(pair("lora_unet_double_blocks_0_img_attn_qkv", 192, 64)), ("double_blocks_0",)),
    "LoRA of SD3": Broken(
        _replace(pair("lora_unet_joint_blocks_0_x_block_attn_qkv", 96, 32)), ("joint_blocks_0_x_block_attn_qkv",)
    ),
    "LoRA of Wan": Broken(_replace(pair("diffusion_model.blocks.0.self_attn.q")), ("blocks.0.self_attn.q",)),
    "LoRA of a language model": Broken(
        _replace(
            {
                "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": ones(2, 32),
                "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": ones(32, 2),
            }
        ),
        ("model.layers.0.self_attn.q_proj",),
    ),
    # options
    "a component to skip that is not there": Broken(lambda f: None, ("vae2",), more=("--skip", "vae2")),
    "a variant that is not there": Broken(lambda f: None, ("fp16",), more=("--variant", "fp16")),
}
