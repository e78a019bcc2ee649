"""What decides the alpha of a module: its own tensor, a PEFT configuration, or the header's metadata."""

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_export.adapters.config import (
    LARGEST,
    LoraConfig,
    Number,
    PatternedRank,
    PositiveNumber,
    match_pattern,
    parse_lora,
    settings,
)
from lora_export.adapters.diffusion.endings import terms
from lora_export.adapters.diffusion.finding import Place
from lora_export.adapters.kind import AdapterFile

PEFT_JSON = "lora_adapter_metadata"
_PLAIN = re.compile(r"(?P<component>\w+)\.(?P<field>r|lora_alpha|use_rslora)$")
_FORMATS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "U8": "<B", "I8": "<b"}
# What alpha does not scale; it is OFT's constraint there, or means nothing.
_UNSCALED = frozenset(
    {"oft_blocks", "on_input", "diff", "diff_b", "diff_m", "set_weight", "w_norm", "b_norm", "weight"}
)


@dataclass(frozen=True, kw_only=True)
class Settings(PatternedRank):
    """Of PEFT's LoHa and LoKr."""

    alpha: Number
    alpha_pattern: Mapping[str, PositiveNumber] | None = None


def configurations(file: AdapterFile, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Component → PEFT's LoRA configuration, as diffusers writes it (JSON) or SimpleTuner (plain keys).

    AdapterError for metadata that is no such thing.
    """
    found: dict[str, dict[str, Any]] = {}
    for key, value in metadata.items():
        if match := _PLAIN.match(key):
            found.setdefault(match["component"], {})[match["field"]] = _plain(value)
    if PEFT_JSON in metadata:
        try:
            told = json.loads(metadata[PEFT_JSON])
        except (ValueError, RecursionError):
            told = None
        if not isinstance(told, dict):
            raise file.refuse(
                f"the metadata {PEFT_JSON} is no JSON object", expected="what diffusers writes, or none"
            )
        for key, value in told.items():
            component, _, field = key.partition(".")
            found.setdefault(component, {})[field] = value
    return found


def _plain(value: str) -> Any:
    try:
        return json.loads(value.lower())
    except (ValueError, RecursionError):
        return value


def splits_qkv(metadata: Mapping[str, str]) -> bool:
    """Whether sd-scripts trained q, k and v of a fused weight apart, and saved one LoRA of three times the rank."""
    try:
        told = json.loads(metadata.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):
        return False
    return isinstance(told, dict) and str(told.get("split_qkv", False)).lower() in ("true", "1")


class Alphas:
    """The alpha of each module of a file, and warnings about them.

    configs: by component, of the metadata or of a PEFT folder; split: as `--split-qkv-alpha`.
    """

    def __init__(
        self, file: AdapterFile, metadata: Mapping[str, str], configs: Mapping[str, Mapping[str, Any]],
        split: str | None,
    ) -> None:  # fmt: skip
        self.warnings: list[str] = []
        self._file, self._configs, self._split = file, configs, split
        self._parsed = {c: self._parse(c) for c in configs if "lora_alpha" in configs[c]}
        self._lycoris = {
            c: settings(config, Settings, file.where)
            for c, config in configs.items()
            if config.get("peft_type") in ("LOHA", "LOKR")
        }
        self._splits = splits_qkv(metadata)
        self._whole = whole_alpha(file, metadata)

    def of(self, place: Place, keys: Mapping[str, str]) -> float | None:
        """None where nothing says it, which means the rank. AdapterError for one that cannot be meant."""
        rank = rank_of(self._file, keys)
        own = self._own(keys)
        told = self._configured(place, keys, rank)
        if own is not None and told is not None and not math.isclose(own, told, rel_tol=1e-2):
            raise self._file.refuse(
                f"alpha is {own:g} in the tensor and {told:g} in the metadata or configuration",
                tensor=keys["alpha"],
                expected="one alpha",
                next_step="remove the wrong one",
            )
        alpha = told if own is None else own
        if alpha is None and self._whole is not None and rank:
            alpha = self._whole
            self._warn(f"alpha {alpha:g} is that of the file's metadata")
        if alpha == 0 and not _UNSCALED & keys.keys():
            self._refuse_zero(keys)
            return None
        if self._splits and len(place.pieces) > 1 and "lora_up" in keys and alpha is not None:
            alpha = self._trained(place, keys, alpha, rank)
        return alpha

    def _own(self, keys: Mapping[str, str]) -> float | None:
        if "alpha" not in keys:
            return None
        return read_alpha(self._file, keys["alpha"])

    def _configured(self, place: Place, keys: Mapping[str, str], rank: int) -> float | None:
        if "lora_down" in keys and rank and place.component in self._parsed:
            return self._parsed[place.component].scaling(place.name, rank) * rank
        lycoris = self._lycoris.get(place.component)
        if lycoris is None or not any(part.startswith(("hada_", "lokr_")) for part in keys):
            return None
        alpha = match_pattern(lycoris.alpha_pattern, place.name, lycoris.alpha)
        if not rank and alpha != lycoris.rank(place.name):
            raise self._file.refuse(
                f"PEFT scales this module by {alpha:g}/{lycoris.rank(place.name)}, and LyCORIS, whose names these "
                "are, scales none whose factors are whole",
                tensor=next(iter(keys.values())),
                expected="alpha as the rank, or factors that are products",
            )
        return alpha

    def _parse(self, component: str) -> LoraConfig:
        config = parse_lora(self._configs[component], self._file.where)
        if config.residual:
            raise self._file.refuse(
                f"{component} was trained from {config.residual}, which takes its start out of the base's weights",
                expected="an adapter of the unchanged base",
                next_step="save it converted: path_initial_model_for_weight_conversion",
            )
        return config

    def _refuse_zero(self, keys: Mapping[str, str]) -> None:
        if all(any(self._is_zero(key) for key in term) for term in terms(keys)):
            self._warn("alpha is 0 in modules whose factors are zero: they change nothing")
            return
        raise self._file.refuse(
            "alpha is 0 and the factors are not: to LyCORIS and sd-scripts 0 means the rank, to others no change",
            tensor=keys.get("alpha", next(iter(keys.values()))),
            expected="the alpha of the training",
            next_step="write it into the file's alpha tensors",
        )

    def _is_zero(self, key: str) -> bool:
        return not bool(self._file.source.read(key).any())

    def _trained(self, place: Place, keys: Mapping[str, str], alpha: float, rank: int) -> float:
        """sd-scripts saves n matrices of rank r as one of rank n·r with the alpha of rank r."""
        count = len(place.pieces)
        if alpha == rank or self._split == "file":
            return alpha
        if rank % count:
            raise self._file.refuse(
                f"the metadata says split_qkv, but the rank {rank} is not {count} times that of the training",
                tensor=keys["lora_down"],
                expected="a file that sd-scripts saved, unchanged",
                next_step="--split-qkv-alpha file, if it was resized since",
            )
        if self._split == "trained":
            return alpha * count
        raise self._file.refuse(
            f"q, k and v were trained apart (split_qkv), so the file has rank {rank} and the alpha {alpha:g} of "
            f"rank {rank // count}: other loaders apply a strength {count} times smaller than the training's",
            tensor=keys["lora_down"],
            expected="to be told which is meant",
            next_step="--split-qkv-alpha trained, as it was trained; --split-qkv-alpha file, as loaders apply it",
        )

    def _warn(self, warning: str) -> None:
        if warning not in self.warnings:
            self.warnings.append(warning)


def whole_alpha(file: AdapterFile, metadata: Mapping[str, str]) -> float | None:
    """One alpha for a file without tensors of it. AdapterError unless it is a positive number."""
    if "alpha" not in metadata:
        return None
    try:
        alpha = float(metadata["alpha"])
    except ValueError:
        alpha = math.nan
    if not 0 < alpha <= LARGEST:
        raise file.refuse(f"the metadata alpha is {metadata['alpha']!r}", expected="a positive number, or none")
    return alpha


def read_alpha(file: AdapterFile, key: str) -> float:
    """The number in a tensor of one element. AdapterError unless it is a finite number of at least 0."""
    info = file.tensors[key]
    if math.prod(info.shape) != 1:
        raise file.refuse(f"the shape of alpha is {list(info.shape)}", tensor=key, expected="one number")
    data = bytearray(info.nbytes)
    info.source.read_into(info, 0, memoryview(data))
    alpha = _number(file, key, info.dtype, bytes(data))
    if not 0 <= alpha <= LARGEST:
        raise file.refuse(f"alpha is {alpha:g}", tensor=key, expected="a finite number, 0 or more")
    return alpha


def _number(file: AdapterFile, key: str, dtype: str, data: bytes) -> float:
    if dtype == "BF16":
        dtype, data = "F32", b"\0\0" + data
    if dtype not in _FORMATS:
        raise file.refuse(f"the type of alpha is {dtype}", tensor=key, expected=", ".join(["BF16", *_FORMATS]))
    return float(struct.unpack(_FORMATS[dtype], data)[0])


def rank_of(file: AdapterFile, keys: Mapping[str, str]) -> int:
    """Rows of the factor that is r high; 0 for a kind without a rank."""
    for part in ("lora_down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b", "a2"):
        if part in keys:
            shape = file.tensors[keys[part]].shape
            return shape[0] if shape else 0
    return 0
