"""adapter_config.json as PEFT writes it, read strictly: what is not understood is refused, never ignored."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_export import patterns
from lora_export.errors import AdapterError
from lora_export.storage.documents import Kind, check, is_kind

# What is read of a configuration without a question of its own.
_FIELDS: Kind = {
    "peft_type?": (None, str),
    "swift_type?": (None, str),
    "peft_version?": (None, str),
    "base_model_name_or_path?": (None, str),
    "modules_to_save?": (None, [str]),
    "target_parameters?": (None, [str]),
    "lora_B_layout?": (None, str),
}
PEFT_EMBEDDINGS = ("embed_tokens", "lm_head")  # EMBEDDING_LAYER_NAMES of peft/utils/constants.py
LARGEST = 1e30  # of an alpha: the arithmetic is fp32, and the factor is multiplied with two matrices
# What changes the result in a way that no weight can hold, or that is not computed here: key → why, what helps.
_REFUSALS: dict[str, tuple[str, str]] = {
    "alora_invocation_tokens": (
        "an activated LoRA (aLoRA) acts only after its invocation tokens, so it depends on the input "
        "and no merged weight equals it",
        "serve it unmerged",
    ),
    "arrow_config": (
        "Arrow routes each token among adapters, so no merged weight equals it",
        "serve it unmerged",
    ),
    "monteclora_config": ("MonteCLoRA samples its matrices", "train with monteclora_config=null"),
    "kasa_config": ("KaSA trains on a truncated base", "train with kasa_config=null"),
    "use_qalora": ("QALoRA pools the input in groups", "train with use_qalora=false"),
    "use_bdlora": ("block-diagonal LoRA", "train with use_bdlora=null"),
    "megatron_config": ("Megatron's parallel layers", "convert the adapter to plain PEFT LoRA first"),
}
# These initialisations change the base weights, so the adapter alone does not belong to the original base.
_RECOMPUTED_INITS = ("pissa", "olora")
_LOST_INITS = ("pissa_niter_", "corda", "lora_ga", "loftq")


@dataclass(frozen=True)
class LoraConfig:
    """The parts of a LoRA configuration that change the merged weights.

    residual: the initialisation that took the adapter's first value out of the base ("pissa", "olora"), or None.
    """

    r: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    residual: str | None
    where: Path

    def scaling(self, module: str, rank: int) -> float:
        """alpha/r, or alpha/√r with rsLoRA (arXiv:2312.03732, eq. 6), with this module's own alpha.

        rank is the rank found in the file; it must be the one that the configuration gives this module.
        """
        expected = match_pattern(self.rank_pattern, module, self.r)
        if rank != expected:
            raise AdapterError(
                f"the tensors have rank {rank}, the configuration gives this module rank {expected}",
                where=self.where,
                tensor=module,
                expected="rank_pattern and r that describe the file",
            )
        alpha = float(match_pattern(self.alpha_pattern, module, self.alpha))
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def match_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first key, in the file's order, that matches the end of the module's name."""
    for key, value in pattern.items():
        if patterns.ends_with(key, module):
            return value
    return default


def check_expression(expression: str, what: str, where: Path) -> None:
    """Refuse what is no regular expression, or one so large that to compile it would fill the memory."""
    reason = patterns.reason_against(expression)
    if reason:
        raise AdapterError(f"{what} {expression!r}: {reason}", where=where, expected="a regular expression")


def check_config(config: Mapping[str, Any], where: Path) -> None:
    """InputError unless every field that is read is of its kind."""
    check(config, _FIELDS, "the configuration", where)


def parse_lora(config: Mapping[str, Any], where: Path) -> LoraConfig:
    """The LoRA configuration, or an AdapterError for whatever would make the merged result another one."""
    refuse_unmergeable(config, where)
    _refuse_trainers(config, where)
    return LoraConfig(
        r=whole(config, "r", where),
        alpha=number(config, "lora_alpha", where),
        use_rslora=bool(config.get("use_rslora")),
        rank_pattern=pattern(config, "rank_pattern", where, int),
        alpha_pattern=pattern(config, "alpha_pattern", where, float),
        residual=_residual(config.get("init_lora_weights", True), where),
        where=where,
    )


def ensures_tying(config: Mapping[str, Any], setting: str) -> bool:
    """Whether PEFT's ensure_weight_tying acts on the modules of a setting: it looks for two names alone.

    (peft/tuners/tuners_utils.py, _check_tied_modules.) setting: target_modules or modules_to_save.
    """
    if not config.get("ensure_weight_tying"):
        return False
    named = config.get(setting) or ()
    if isinstance(named, str):
        return any(patterns.fullmatch(named, name) is not None for name in PEFT_EMBEDDINGS)
    return any(str(n).rpartition(".")[2] in PEFT_EMBEDDINGS for n in named)


def refuse_unmergeable(config: Mapping[str, Any], where: Path) -> None:
    """Refuse the LoRA settings that make the adapter depend on its input, or that are not computed here."""
    for key, (why, next_step) in _REFUSALS.items():
        if config.get(key):
            raise AdapterError(f"{why}: {key} is set", where=where, expected=f"no {key}", next_step=next_step)


def _refuse_trainers(config: Mapping[str, Any], where: Path) -> None:
    """What some trainers write, looks like an adapter for the original base, and is not one."""
    if config.get("lora_alpha") == 0:
        raise AdapterError(
            "lora_alpha is 0, so merging would change nothing (verl writes this where it lost the value)",
            where=where,
            expected="the alpha of the training",
            next_step="set lora_alpha in adapter_config.json to what the training had",
        )
    enabled = config.get("enable_lora")
    if isinstance(enabled, list) and any(enabled):
        raise AdapterError(
            "enable_lora: LoRA on parts of a fused projection, which PEFT has not known since 0.3",
            where=where,
            expected="an adapter of PEFT 0.3 or newer",
            next_step="merge it with the PEFT that saved it",
        )
    if where.parent.name in ("pissa_init", "pissa_backup"):
        raise AdapterError(
            f"LLaMA-Factory's {where.parent.name} belongs to a base from which its first value was taken out",
            where=where,
            expected="the converted adapter",
            next_step="give the folder pissa_converted beside it",
        )


def whole(config: Mapping[str, Any], key: str, where: Path) -> int:
    """A positive whole number of the configuration."""
    value: Any = config.get(key)
    if not is_kind(value, int) or value < 1:
        raise AdapterError(f"{key} is {value!r}", where=where, expected="a positive whole number")
    return int(value)


def number(config: Mapping[str, Any], key: str, where: Path) -> float:
    """A finite number of the configuration."""
    value: Any = config.get(key)
    if not is_kind(value, float) or abs(value) > LARGEST:
        raise AdapterError(f"{key} is {value!r}", where=where, expected=f"a number of at most {LARGEST:g}")
    return float(value)


def pattern(config: Mapping[str, Any], key: str, where: Path, kind: type[int] | type[float]) -> dict[str, Any]:
    """rank_pattern or alpha_pattern: regular expression → positive number of a kind."""
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise AdapterError(f"{key} is {value!r}", where=where, expected="a map from module to number")
    for name, size in value.items():
        check_expression(name, f"{key} has the key", where)
        if not is_kind(size, kind) or not 0 < size <= LARGEST:
            words = "a positive whole number" if kind is int else "a positive number"
            raise AdapterError(f"{key} gives {name!r} the value {size!r}", where=where, expected=words)
    return value


def _residual(init: Any, where: Path) -> str | None:
    kind = init.lower() if isinstance(init, str) else ""
    if kind.startswith(_LOST_INITS):
        raise AdapterError(
            f"init_lora_weights is {init!r}: this adapter was trained on a changed base, not on the original, and "
            "what was taken out of the base cannot be computed from it again",
            where=where,
            expected="an adapter converted to plain LoRA",
            next_step="in the training script: model.save_pretrained(DIR, "
            "path_initial_model_for_weight_conversion=INITIAL_ADAPTER)",
        )
    return kind if kind in _RECOMPUTED_INITS else None
