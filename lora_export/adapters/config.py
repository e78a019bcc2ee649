"""adapter_config.json as PEFT writes it, read strictly: what is not understood is refused, never ignored."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_export.errors import AdapterError

# What changes the result in a way that no kind here computes: key → why, and what helps.
_REFUSALS: dict[str, tuple[str, str]] = {
    "use_dora": ("DoRA rescales each row of the merged weight", "merge it with PEFT, or train without use_dora"),
    "alora_invocation_tokens": (
        "an activated LoRA (aLoRA) acts only after its invocation tokens, so it depends on the input "
        "and no merged weight equals it",
        "serve it unmerged",
    ),
    "arrow_config": (
        "Arrow routes each token among adapters, so no merged weight equals it",
        "serve it unmerged",
    ),
    "use_qalora": ("QALoRA pools the input in groups", "train with use_qalora=false"),
    "use_bdlora": ("block-diagonal LoRA", "train with use_bdlora=null"),
    "layer_replication": ("layer_replication changes the number of layers", "train without layer_replication"),
    "target_parameters": ("fused expert parameters (target_parameters)", "target the linear layers instead"),
    "trainable_token_indices": ("trained token rows", "use modules_to_save=['embed_tokens'] instead"),
    "megatron_config": ("Megatron's parallel layers", "convert the adapter to plain PEFT LoRA first"),
    "corda_config": ("CorDA trains on a changed base", "convert it (see init_lora_weights)"),
}
# These initialisations change the base weights, so the adapter alone does not belong to the original base.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(frozen=True)
class LoraConfig:
    """The parts of a LoRA configuration that change the merged weights."""

    r: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    fan_in_fan_out: bool
    bias: str
    lora_bias: bool
    modules_to_save: tuple[str, ...]
    base_model: str | None
    where: Path

    def scaling(self, module: str, rank: int) -> float:
        """alpha/r, or alpha/√r with rsLoRA (arXiv:2312.03732, eq. 6), with this module's own alpha.

        rank is the rank found in the file; it must be the one that the configuration gives this module.
        """
        expected = _match(self.rank_pattern, module, self.r)
        if rank != expected:
            raise AdapterError(
                f"the tensors have rank {rank}, the configuration gives this module rank {expected}",
                where=self.where,
                tensor=module,
                expected="rank_pattern and r that describe the file",
            )
        alpha = float(_match(self.alpha_pattern, module, self.alpha))
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _match(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first key, in the file's order, that matches the end of the module's name."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def parse_lora(config: Mapping[str, Any], where: Path) -> LoraConfig:
    """The LoRA configuration, or an AdapterError for whatever would make the merged result another one."""
    for key, (why, next_step) in _REFUSALS.items():
        if config.get(key):
            raise AdapterError(f"{why}: {key} is set", where=where, expected=f"no {key}", next_step=next_step)
    _check_init(config.get("init_lora_weights", True), where)
    r, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise AdapterError(f"r is {r!r}", where=where, expected="a positive whole number")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise AdapterError(f"lora_alpha is {alpha!r}", where=where, expected="a number")
    bias = config.get("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        raise AdapterError(f"bias is {bias!r}", where=where, expected="none, all or lora_only")
    return LoraConfig(
        r=r,
        alpha=float(alpha),
        use_rslora=bool(config.get("use_rslora")),
        rank_pattern=_pattern(config, "rank_pattern", where),
        alpha_pattern=_pattern(config, "alpha_pattern", where),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        bias=bias,
        lora_bias=bool(config.get("lora_bias")),
        modules_to_save=tuple(config.get("modules_to_save") or ()),
        base_model=config.get("base_model_name_or_path"),
        where=where,
    )


def _pattern(config: Mapping[str, Any], key: str, where: Path) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise AdapterError(f"{key} is {value!r}", where=where, expected="a map from module to number")
    for pattern, number in value.items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise AdapterError(f"{key} has the key {pattern!r}: {error}", where=where) from None
        if not isinstance(number, int | float) or isinstance(number, bool) or not number > 0:
            raise AdapterError(f"{key} gives {pattern!r} the value {number!r}", where=where, expected="> 0")
    return value


def _check_init(init: Any, where: Path) -> None:
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise AdapterError(
            f"init_lora_weights is {init!r}: this adapter was trained on a changed base, not on the original",
            where=where,
            expected="an adapter converted to plain LoRA",
            next_step="in the training script: model.save_pretrained(DIR, "
            "path_initial_model_for_weight_conversion=INITIAL_ADAPTER)",
        )
