"""Every way to train an adapter, as a PEFT configuration for a family: None where the family has no such layer."""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import peft

from tests.matrix.families import Family, tokens
from tests.matrix.rare import RARE

Kind = Callable[[Family], Any]
TRAINED = sorted(set(tokens()["input_ids"][0, :3].tolist()))
R, ALPHA = 4, 10  # alpha/r is 2.5, alpha/√r is 5: a forgotten scaling shows


def lora(family: Family, **changes: Any) -> Any:
    modules = changes.pop("modules", None) or list(family.linear)
    targets = {} if "target_modules" in changes else {"target_modules": modules}
    return peft.LoraConfig(**{"r": R, "lora_alpha": ALPHA} | targets | family.settings | changes)


def _linear(**changes: Any) -> Kind:
    return lambda family: lora(family, **changes) if family.linear else None


def _two(family: Family) -> list[str]:
    return list(family.linear[:2])


def _patterns(family: Family) -> Any:
    if not family.linear:
        return None
    first, last = family.linear[0], family.linear[-1]
    # Several keys match one module: the first in the file's order decides, and PEFT writes them as they are here.
    return lora(family, rank_pattern={rf".*1.*\.{first}": 3, first: 5, last: 2}, alpha_pattern={last: 7, first: 3})


def _bias(word: str) -> Kind:
    return lambda family: lora(family, bias=word) if family.linear and family.biases else None


def _lora_bias(family: Family) -> Any:
    return lora(family, lora_bias=True, modules=_two(family)) if family.linear and family.biases else None


def _embedding(**changes: Any) -> Kind:
    def build(family: Family) -> Any:
        # A Conv1D's fan_in_fan_out does not concern the embedding, but PEFT wants one word for all.
        return lora(family, modules=[family.embedding], **changes) if family.embedding else None

    return build


def _convolution(**changes: Any) -> Kind:
    return lambda family: lora(family, modules=[family.convolution], **changes) if family.convolution else None


def _head(family: Family) -> Any:
    return lora(family, modules=[family.head, *family.linear[:1]], fan_in_fan_out=False) if family.head else None


def _saved(which: Callable[[Family], str | None]) -> Kind:
    def build(family: Family) -> Any:
        name = which(family)
        return lora(family, modules=_two(family), modules_to_save=[name]) if name and family.linear else None

    return build


def _some_layers(family: Family) -> Any:
    return lora(family, layers_to_transform=[1]) if family.layers else None


def _all_but(family: Family) -> Any:
    return lora(family, exclude_modules=[family.linear[0]]) if len(family.linear) > 1 else None


def _regex(family: Family) -> Any:
    return lora(family, target_modules=rf".*\.({'|'.join(family.linear[:2])})") if family.linear else None


def _every_linear(family: Family) -> Any:
    return lora(family, target_modules="all-linear") if family.linear and not family.conv1d else None


def _tokens(family: Family) -> Any:
    if not family.embedding or not family.linear:
        return None
    return lora(family, modules=_two(family), trainable_token_indices={family.embedding: TRAINED})


def _tokens_only(family: Family) -> Any:
    if not family.embedding:
        return None
    return peft.TrainableTokensConfig(target_modules=[family.embedding], token_indices=TRAINED)


def _replication(family: Family) -> Any:
    return lora(family, layer_replication=[[0, 2], [0, 1], [1, 2]]) if family.layers else None


def _experts(*parameters: int, **changes: Any) -> Kind:
    def build(family: Family) -> Any:
        if not family.experts:
            return None
        names = [family.experts[i] for i in parameters]
        return lora(family, modules=_two(family), target_parameters=names, **changes)

    return build


def _adalora(family: Family) -> Any:
    if not family.linear:
        return None
    return peft.AdaLoraConfig(
        init_r=6,
        target_r=3,
        lora_alpha=ALPHA,
        total_step=100,
        target_modules=list(family.linear),
        **family.settings,
    )


def _adalora_convolution(family: Family) -> Any:
    if not family.convolution:
        return None
    return peft.AdaLoraConfig(
        init_r=6, target_r=3, lora_alpha=ALPHA, total_step=100, target_modules=[family.convolution]
    )


def _ia3(family: Family) -> Any:
    if not family.linear:
        return None
    return peft.IA3Config(
        target_modules=[*family.linear, *family.feedforward],
        feedforward_modules=list(family.feedforward),
        **family.settings,
    )


def _ia3_convolution(family: Family) -> Any:
    if not family.convolution:
        return None
    return peft.IA3Config(target_modules=[family.convolution], feedforward_modules=[])


def _lycoris(config: type, convolution: bool = False, **changes: Any) -> Kind:
    def build(family: Family) -> Any:
        modules = [family.convolution] if convolution else list(family.linear)
        if not modules or modules == [None]:
            return None
        settings = {"r": R, "alpha": ALPHA, "target_modules": modules, "init_weights": False} | changes
        return config(**settings)

    return build


def _vera(**changes: Any) -> Kind:
    def build(family: Family) -> Any:
        if not family.linear:
            return None
        settings = {"r": 6, "target_modules": list(family.linear), "projection_prng_key": 7, "d_initial": 0.3}
        return peft.VeraConfig(**settings | family.settings | changes)

    return build


def _orthogonal(config: type, convolution: bool = False, **changes: Any) -> Kind:
    def build(family: Family) -> Any:
        modules = [family.convolution] if convolution else list(family.linear)
        if not modules or modules == [None]:
            return None
        return config(target_modules=modules, **{**({} if convolution else family.settings), **changes})

    return build


def _plain(config: type, rank: int = R, embedding: bool = False, convolution: bool = False, **changes: Any) -> Kind:
    """A kind whose configuration has no more than PEFT's usual fields."""

    def build(family: Family) -> Any:
        modules = [family.embedding] if embedding else [family.convolution] if convolution else list(family.linear)
        if not modules or modules == [None]:
            return None
        known = {f.name for f in dataclasses.fields(config)}
        settings = {"r": rank} if "r" in known else {}
        if "fan_in_fan_out" in known and not embedding and not convolution:
            settings |= family.settings
        return config(target_modules=modules, init_weights=False, **settings | changes)

    return build


def _only_biases(config: type, **changes: Any) -> Kind:
    kind = _plain(config, **changes)
    return lambda family: kind(family) if family.biases else None


def _osf(family: Family) -> Any:
    kind = _plain(peft.OSFConfig, effective_rank=0.6)
    return None if family.conv1d else kind(family)  # PEFT passes over a Conv1D in silence


KINDS: dict[str, Kind] = {
    "lora": _linear(),
    "lora rslora": _linear(use_rslora=True),
    "lora patterns": _patterns,
    "lora lora_bias": _lora_bias,
    "lora bias all": _bias("all"),
    "lora bias lora_only": _bias("lora_only"),
    "lora embedding": _embedding(),
    "lora embedding rslora": _embedding(use_rslora=True),
    "lora convolution": _convolution(),
    "lora convolution rslora": _convolution(use_rslora=True),
    "lora head": _head,
    "lora norm saved": _saved(lambda f: f.norm),
    "lora head saved": _saved(lambda f: f.head),
    "lora embedding saved": _saved(lambda f: f.embedding),
    "lora layers_to_transform": _some_layers,
    "lora exclude_modules": _all_but,
    "lora target regex": _regex,
    "lora all-linear": _every_linear,
    "lora pissa": _linear(init_lora_weights="pissa"),
    "lora olora": _linear(init_lora_weights="olora"),
    "lora tokens": _tokens,
    "tokens": _tokens_only,
    "lora replication": _replication,
    "lora experts": _experts(0, 1),
    "lora experts up": _experts(0),
    "lora experts down": _experts(1),
    "lora experts rslora": _experts(0, 1, use_rslora=True),
    "lora experts patterns": _experts(
        0, 1, rank_pattern={"experts.down_proj": 3}, alpha_pattern={"gate_up_proj": 7}
    ),
    "dora": _linear(use_dora=True),
    "dora rslora": _linear(use_dora=True, use_rslora=True),
    "dora embedding": _embedding(use_dora=True),
    "dora convolution": _convolution(use_dora=True),
    "adalora": _adalora,
    "adalora pruned": _adalora,
    "adalora convolution": _adalora_convolution,
    "ia3": _ia3,
    "ia3 convolution": _ia3_convolution,
    "loha": _lycoris(peft.LoHaConfig),
    "loha patterns": _lycoris(peft.LoHaConfig, rank_pattern={".*1.*": 3}, alpha_pattern={".*0.*": 7}),
    "loha convolution": _lycoris(peft.LoHaConfig, True),
    "loha tucker": _lycoris(peft.LoHaConfig, True, use_effective_conv2d=True),
    "lokr": _lycoris(peft.LoKrConfig),
    "lokr both": _lycoris(peft.LoKrConfig, decompose_both=True, r=2),
    "lokr factor": _lycoris(peft.LoKrConfig, decompose_factor=4, r=2),
    "lokr convolution": _lycoris(peft.LoKrConfig, True, r=2),
    "lokr tucker": _lycoris(peft.LoKrConfig, True, use_effective_conv2d=True, r=2),
    "vera": _vera(save_projection=True),
    "vera regenerated": _vera(save_projection=False),
    "oft": _orthogonal(peft.OFTConfig, oft_block_size=4, use_cayley_neumann=False),
    "oft neumann": _orthogonal(peft.OFTConfig, oft_block_size=4, use_cayley_neumann=True),
    "oft shared": _orthogonal(peft.OFTConfig, oft_block_size=4, use_cayley_neumann=False, block_share=True),
    "oft convolution": _orthogonal(peft.OFTConfig, True, r=1, oft_block_size=0, use_cayley_neumann=False),
    "boft": _orthogonal(peft.BOFTConfig, boft_block_size=4, boft_n_butterfly_factor=1),
    "boft butterflies": _orthogonal(peft.BOFTConfig, boft_block_size=4, boft_n_butterfly_factor=2),
    "beft": _only_biases(peft.BeftConfig),
    "deft": _plain(peft.DeftConfig, alpha=ALPHA),
    "deft qr": _plain(peft.DeftConfig, alpha=ALPHA, decomposition_method="qr"),
    "deft para": _plain(peft.DeftConfig, para=True),
    "frod": _plain(peft.FrodConfig, sparse_rate=0.1, progressbar=False),
    "glora": _plain(peft.GloraConfig),
    "glora vector": _plain(peft.GloraConfig, config_A_B="vector", config_C="vector", config_D_E="vector"),
    "glora constant": _plain(peft.GloraConfig, config_A_B="constant", config_C="none", config_D_E="constant"),
    "glora none": _only_biases(peft.GloraConfig, config_A_B="none", config_C="vector", config_D_E="none"),
    "glora bias": _only_biases(peft.GloraConfig, bias="glora_only"),
    "hira": _plain(peft.HiraConfig),
    "hira embedding": _plain(peft.HiraConfig, embedding=True),
    "hira convolution": _plain(peft.HiraConfig, convolution=True),
    "osf": _osf,
    "peanut": _plain(peft.PeanutConfig, scaling=2.5),
    "peanut deep": _plain(peft.PeanutConfig, scaling=0.5, depth=2, act_fn="gelu"),
    "psoft": _plain(peft.PsoftConfig, psoft_alpha=ALPHA),
    "psoft pissa": _plain(peft.PsoftConfig, psoft_alpha=ALPHA, ab_svd_init="pissa_init", psoft_mag_a=False),
    "psoft neumann": _plain(
        peft.PsoftConfig, psoft_alpha=ALPHA, use_cayley_neumann=True, cayley_neumann_eps=0.4, psoft_mag_b=False
    ),
    "psoft lowrank": _plain(
        peft.PsoftConfig, psoft_alpha=ALPHA, psoft_svd="lowrank", random_seed=3, psoft_orth=False
    ),
    "pvera": _plain(peft.PveraConfig, 6, projection_prng_key=7, save_projection=True),
    "pvera regenerated": _plain(peft.PveraConfig, 6, projection_prng_key=7, save_projection=False),
    "supertuning": _plain(peft.SupertuningConfig, rank=None, sparsity=0.9),
    "supertuning supra": _plain(peft.SupertuningConfig, lora_alpha=ALPHA, sparsity=0.9),
    "tinylora": _plain(peft.TinyLoraConfig, u=6),
    "tinylora tied": _plain(peft.TinyLoraConfig, u=6, weight_tying=0.6),
    "tinylora regenerated": _plain(peft.TinyLoraConfig, u=6, weight_tying=0.3, save_projection=False),
    "tinylora embedding": _plain(peft.TinyLoraConfig, embedding=True, u=6),
    "unilora": _plain(peft.UniLoraConfig, theta_d_length=50),
    "unilora bias": _only_biases(peft.UniLoraConfig, theta_d_length=50, bias="all"),
    "unilora saved": _plain(peft.UniLoraConfig, theta_d_length=50, save_indices=True),
}
KINDS |= RARE
# These run every day on one family alone.
SELDOM = frozenset(list(KINDS)[list(KINDS).index("beft") :])
if importlib.util.find_spec("sklearn"):  # PEFT cannot even configure it without
    KINDS["adamss"] = _plain(peft.AdamssConfig, 12, num_subspaces=3, subspace_rank=2)
    SELDOM |= {"adamss"}
