"""A single-file adapter looked at without a base: what its names, its shapes and its metadata say."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_export.adapters.config import parse_lora
from lora_export.adapters.diffusion.endings import grouped, refuse_incomplete
from lora_export.adapters.diffusion.kinds import kind_of
from lora_export.adapters.diffusion.metadata import (
    PEFT_JSON,
    configurations,
    rank_of,
    read_alpha,
    splits_qkv,
    whole_alpha,
)
from lora_export.adapters.diffusion.reading import format_of
from lora_export.adapters.diffusion.strangers import refuse_empty, refuse_strangers
from lora_export.adapters.diffusion.vectors import Vectors, vector_names, vectors_of
from lora_export.adapters.kind import AdapterFile
from lora_export.contracts.pipelines import AdapterFormat, TrainedModule
from lora_export.errors import LoraExportError

# Metadata that says what a file is and how it is meant, in this order.
MATTERS = (
    "modelspec.architecture", "ss_base_model_version", "ss_sd_model_name", "ss_new_sd_model_hash",
    "ss_sd_model_hash", "ss_v2", "modelspec.prediction_type", "modelspec.resolution", "ss_network_module",
    "ss_network_dim", "ss_network_alpha", "ss_network_args", PEFT_JSON, "alpha", "software", "modelspec.title",
    "sshs_model_hash",
)  # fmt: skip
_PLAIN = re.compile(r"\w+\.(?:r|lora_alpha|use_rslora)")  # SimpleTuner's: transformer.lora_alpha
_LONGEST = 200  # characters of a value that are shown
_ROLES: tuple[tuple[str, str], ...] = (
    (r"(?:lora|oft)_te3_", "text_encoder_3"),
    (r"(?:lora|oft)_te2_|text_encoder_2\.", "text_encoder_2"),
    (r"text_encoder_3\.", "text_encoder_3"),
    (r"(?:lora|oft)_te1?_|text_encoder\.|text_model\.", "text_encoder"),
    (r"lora_prior_unet_", "prior"),
    (r"unet\.", "unet"),
    (r"lora_transformer_|transformer\.", "transformer"),
    (r"transformer_2\.", "transformer_2"),
    (r"(?:text_encoders\.)?(?P<name>clip_l|clip_g|t5xxl)\.", ""),
)
_PREFIX = re.compile(r"(?:lora|oft)_(?:unet|transformer|prior_unet|te\d?)_+|lycoris_|base_model\.model\.")
_NUMBER = re.compile(r"(?<!net)[._]\d+(?=[._])")  # of a block; ff.net.0.proj is a module's own name


@dataclass(frozen=True)
class SeenModule:
    """role: the component by its prefix, `denoiser` where that says no more; target: the module's own name in its
    block (`attn1_to_q`); rank: None for kinds without one; alpha: None where the file does not say it."""

    spelling: str
    role: str
    target: str
    kind: str
    rank: int | None
    alpha: float | None

    @property
    def scale(self) -> float | None:
        """alpha/rank; 1 where the file does not say alpha, None for kinds without a rank."""
        if not self.rank:
            return None
        return 1.0 if not self.alpha else self.alpha / self.rank


@dataclass(frozen=True)
class Seen:
    """unknown: tensors whose endings no kind has; problems: why a merge would refuse it whatever the base is."""

    format: AdapterFormat
    modules: tuple[SeenModule, ...]
    vectors: tuple[Vectors, ...]
    unknown: tuple[str, ...]
    problems: tuple[str, ...]
    splits_qkv: bool


def look_at(file: AdapterFile, metadata: Mapping[str, str]) -> Seen:
    """What can be said of an adapter from its header and its alphas. AdapterError for a file of another nature."""
    refuse_strangers(file)
    refuse_empty(file)
    names = vector_names(list(file.tensors))
    groups, unknown = grouped(file, [n for n in file.tensors if n not in set(names)])
    configs, problems = _configs(file, metadata)
    modules = []
    for spelling, keys in groups.items():
        try:
            modules.append(_module(file, spelling, keys, configs, metadata))
        except LoraExportError as error:
            problems.append(f"{error.found} ({error.tensor})" if error.tensor else error.found)
    vectors: tuple[Vectors, ...] = ()
    try:
        vectors = tuple(vectors_of(file, names))
    except LoraExportError as error:
        problems.append(error.found)
    return Seen(
        format_of(groups, metadata), tuple(modules), vectors, tuple(unknown), tuple(problems), splits_qkv(metadata)
    )


def _configs(file: AdapterFile, metadata: Mapping[str, str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    try:
        return configurations(file, metadata), []
    except LoraExportError as error:
        return {}, [error.found]


def _module(
    file: AdapterFile,
    spelling: str,
    keys: Mapping[str, str],
    configs: Mapping[str, Mapping[str, Any]],
    metadata: Mapping[str, str],
) -> SeenModule:
    refuse_incomplete(file, spelling, keys)
    parts = {part: key for part, key in keys.items() if part != "alpha"}
    role = role_of(spelling)
    kind = kind_of(TrainedModule(spelling, role, (), parts))
    rank = rank_of(file, keys) or None
    alpha = read_alpha(file, keys["alpha"]) if "alpha" in keys else None
    config = configs.get(role, {})
    if alpha is None and rank and "lora_alpha" in config:
        name = spelling.removeprefix(f"{role}.")
        alpha = parse_lora(config, file.where).scaling(name, rank) * rank
    if alpha is None and rank:
        alpha = whole_alpha(file, metadata)
    return SeenModule(spelling, role, target_of(spelling), kind, rank, alpha)


def role_of(spelling: str) -> str:
    """The component that a spelling's prefix names; `denoiser` where it names none."""
    for pattern, role in _ROLES:
        if match := re.match(pattern, spelling):
            return role or match["name"]
    return "denoiser"


def target_of(spelling: str) -> str:
    """What a module is called in its block: `attn1.to_q` of `down_blocks.0.attentions.1.attn1.to_q`."""
    name = _PREFIX.sub("", spelling, count=1)
    *_, last = _NUMBER.split(name)
    return re.sub(r"^(?:\d+[._])+", "", last.lstrip("._")) or name


def that_matters(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What of a file's metadata says how it is meant; JSON inside it read, long texts cut."""
    keys = [*(k for k in MATTERS if k in metadata), *(k for k in metadata if _PLAIN.fullmatch(k))]
    return {key: _value(metadata[key]) for key in keys}


def _value(text: str) -> Any:
    if text.startswith("{") and len(text) < 100 * _LONGEST:
        try:
            told = json.loads(text)
        except (ValueError, RecursionError):
            return text[:_LONGEST]
        return {k: v for k, v in told.items() if v not in (None, [], {}, "")}
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
