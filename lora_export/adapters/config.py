"""adapter_config.json as PEFT writes it, read strictly: what is not understood is refused, never ignored.

Each kind declares a frozen dataclass of the fields that it reads, which `settings` decodes.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NewType, TypeVar, Union, get_args, get_origin, get_type_hints

from lora_export import patterns
from lora_export.errors import AdapterError, InputError
from lora_export.storage.documents import decode

S = TypeVar("S")
V = TypeVar("V")

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

Positive = NewType("Positive", int)
Count = NewType("Count", int)
Number = NewType("Number", float)
PositiveNumber = NewType("PositiveNumber", float)
_RANGES: dict[Any, Callable[[Any], bool]] = {
    Positive: lambda value: value >= 1,
    Count: lambda value: value >= 0,
    Number: lambda value: abs(value) <= LARGEST,
    PositiveNumber: lambda value: 0 < value <= LARGEST,
}
_EXPECTED: dict[Any, str] = {
    Positive: "a positive whole number", Count: "0 or a positive whole number", int: "a whole number of 64 bits",
    PositiveNumber: "a positive number", Number: f"a number of at most {LARGEST:g}", str: "a string",
    bool: "true or false, as PEFT writes it", list[str]: "a list of strings",
}  # fmt: skip


@dataclass(frozen=True)
class General:
    """What is read of any configuration. swift_type: ms-swift's word for the type."""

    peft_type: str | None = None
    swift_type: str | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    modules_to_save: list[str] | None = None
    target_parameters: list[str] | None = None
    lora_B_layout: str | None = None


@dataclass(frozen=True)
class Ranked:
    """Of a kind with a rank and nothing else."""

    r: Positive


@dataclass(frozen=True)
class PatternedRank:
    """Of a kind with a rank for each module: the first expression in rank_pattern that matches decides, else r."""

    r: Positive
    rank_pattern: Mapping[str, Positive] | None = None

    def rank(self, module: str) -> int:
        return match_pattern(self.rank_pattern, module, self.r)


@dataclass(frozen=True, kw_only=True)
class _Lora(PatternedRank):
    lora_alpha: Number
    use_rslora: bool | None = None
    alpha_pattern: Mapping[str, PositiveNumber] | None = None


@dataclass(frozen=True)
class LoraConfig:
    """The parts of a LoRA configuration that change the merged weights.

    residual: the initialisation that took the adapter's first value out of the base ("pissa", "olora"), or None.
    """

    fields: _Lora
    residual: str | None
    where: Path

    def scaling(self, module: str, rank: int) -> float:
        """alpha/r, or alpha/√r with rsLoRA (arXiv:2312.03732, eq. 6), with this module's own alpha.

        rank is the rank found in the file; it must be the one that the configuration gives this module.
        """
        expected = self.fields.rank(module)
        if rank != expected:
            raise AdapterError(
                f"the tensors have rank {rank}, the configuration gives this module rank {expected}",
                where=self.where,
                tensor=module,
                expected="rank_pattern and r that describe the file",
            )
        alpha = match_pattern(self.fields.alpha_pattern, module, self.fields.lora_alpha)
        return alpha / math.sqrt(rank) if self.fields.use_rslora else alpha / rank


def settings(config: Mapping[str, Any], type_: type[S], where: Path) -> S:
    """The fields of a configuration that a frozen dataclass names; AdapterError for one of another type or range.

    A field without a default must be there. The keys of a mapping are expressions that match modules.
    """
    return type_(
        **{
            name: _field(name, config.get(name), hint, where)
            for name, hint in get_type_hints(type_).items()
            if name in config or not hasattr(type_, name)
        }
    )


def _field(name: str, value: Any, hint: Any, where: Path) -> Any:
    if get_origin(hint) in (Union, UnionType):
        if value is None:
            return None
        hint = next(h for h in get_args(hint) if h is not type(None))
    if get_origin(hint) is not Mapping:
        if not _is(value, hint):
            raise AdapterError(f"{name} is {value!r}", where=where, expected=_words(hint))
        return value if get_origin(hint) is Literal else decode(value, hint, name, where)
    if not isinstance(value, dict):
        raise AdapterError(f"{name} is {value!r}", where=where, expected="a map from module to number")
    of = get_args(hint)[1]
    for expression, number in value.items():
        check_expression(expression, f"{name} has the key", where)
        if not _is(number, of):
            problem = f"{name} gives {expression!r} the value {number!r}"
            raise AdapterError(problem, where=where, expected=_words(of))
    return value


def _is(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:  # Python takes 1 for True
        return any(type(value) is type(known) and value == known for known in get_args(hint))
    try:
        decode(value, hint, "", "")
    except InputError:
        return False
    return hint not in _RANGES or _RANGES[hint](value)


def _words(hint: Any) -> str:
    if get_origin(hint) is not Literal:
        return _EXPECTED[hint]
    *words, last = (str(w).lower() if isinstance(w, bool) else repr(w) for w in get_args(hint))
    return f"{', '.join(words)} or {last}"


def match_pattern(pattern: Mapping[str, V] | None, module: str, default: V) -> V:
    """PEFT's rule: the first key, in the file's order, that matches the end of the module's name."""
    for key, value in (pattern or {}).items():
        if patterns.ends_with(key, module):
            return value
    return default


def check_expression(expression: str, what: str, where: Path) -> None:
    """Refuse what is no regular expression, or one so large that to compile it would fill the memory."""
    reason = patterns.reason_against(expression)
    if reason:
        raise AdapterError(f"{what} {expression!r}: {reason}", where=where, expected="a regular expression")


def parse_lora(config: Mapping[str, Any], where: Path) -> LoraConfig:
    """The LoRA configuration, or an AdapterError for whatever would make the merged result another one."""
    refuse_unmergeable(config, where)
    _refuse_trainers(config, where)
    return LoraConfig(
        settings(config, _Lora, where), _residual(config.get("init_lora_weights", True), where), where
    )


def ensures_tying(config: Mapping[str, Any], setting: str) -> bool:
    """Whether PEFT's ensure_weight_tying acts on the modules of a setting: it looks for two names alone.

    (peft/tuners/tuners_utils.py, _check_tied_modules.) setting: target_modules or modules_to_save.
    """
    if not config.get("ensure_weight_tying"):
        return False
    targets = config.get(setting) or ()
    if isinstance(targets, str):
        return any(patterns.fullmatch(targets, name) is not None for name in PEFT_EMBEDDINGS)
    return any(str(n).rpartition(".")[2] in PEFT_EMBEDDINGS for n in targets)


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
            "enable_lora: LoRA on parts of a fused projection, which PEFT dropped in 0.3",
            where=where,
            expected="an adapter of PEFT 0.3 or newer",
            next_step="merge it with the PEFT that saved it",
        )
    if where.parent.name in ("pissa_init", "pissa_backup"):
        raise AdapterError(
            f"LLaMA-Factory's {where.parent.name} belongs to a base from which its initial value was subtracted",
            where=where,
            expected="the converted adapter",
            next_step="give the folder pissa_converted beside it",
        )


def _residual(init: Any, where: Path) -> str | None:
    kind = init.lower() if isinstance(init, str) else ""
    if kind.startswith(_LOST_INITS):
        raise AdapterError(
            f"init_lora_weights is {init!r}: this adapter was trained on a modified base, and "
            "what was subtracted from the base cannot be recomputed",
            where=where,
            expected="an adapter converted to plain LoRA",
            next_step="in the training script: model.save_pretrained(DIR, "
            "path_initial_model_for_weight_conversion=INITIAL_ADAPTER)",
        )
    return kind if kind in _RECOMPUTED_INITS else None
