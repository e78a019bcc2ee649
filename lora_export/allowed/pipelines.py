"""What diffusers and Optimum read of a pipeline: its index, its scheduler, and the folders of its models.

Both import the library that model_index.json names for a part, and call a class of it: the names are listed here.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.allowed import hub
from lora_export.allowed.fields import FLAG, NUMBER, WORD, Rule, Value, check, read
from lora_export.errors import InputError
from lora_export.storage import sealed

INDEX, SCHEDULER, PICTURE = "model_index.json", "scheduler_config.json", "sample.png"
_PIPELINE = re.compile(r"[A-Z]\w*Pipeline")
# Part → library → classes. What has weights: any class of these libraries that ends so.
_MODEL = re.compile(
    r"[A-Z]\w*(Model|ModelWithProjection|TextModel|ForCausalLM|ForConditionalGeneration|Transformer\w*)|\w*Autoencoder\w*"
)
_PARTS: tuple[tuple[re.Pattern[str], str, re.Pattern[str]], ...] = (
    (re.compile("scheduler"), "diffusers", re.compile(r"[A-Z]\w*Scheduler")),
    (re.compile(r"tokenizer(_\d)?"), "transformers", re.compile(r"[A-Z]\w*Tokenizer(Fast)?")),
    (
        re.compile("feature_extractor|image_processor"),
        "transformers",
        re.compile(r"[A-Z]\w*(Processor(Fast)?|FeatureExtractor)"),
    ),
    (re.compile(r"text_encoder(_\d)?|image_encoder"), "transformers", _MODEL),
    (re.compile(r"unet|transformer(_\d)?|vae"), "diffusers", _MODEL),
    # A model of diffusers' own, which its pipelines name by the module that they lie in.
    (re.compile("safety_checker"), "stable_diffusion", re.compile("StableDiffusionSafetyChecker")),
)
# Settings of the pipelines themselves.
_SETTING: Rule = (FLAG, NUMBER, WORD, Value("null", lambda v: v is None))
_SETTINGS = frozenset(
    {
        "_diffusers_version", "_name_or_path", "add_watermarker", "force_zeros_for_empty_prompt", "is_distilled",
        "requires_aesthetics_score", "requires_safety_checker",
    }
)  # fmt: skip
# Folders of ONNX graphs that no part of the index is named after.
_HALVES = frozenset({"vae_encoder", "vae_decoder"})
_SCHEDULER_VALUE: Rule = (*_SETTING, [(*_SETTING,)])
_PNG, _LARGEST_SIDE = b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR", 4096


def check_pipeline(folder: Path) -> None:
    """InputError or CheckpointError for what is not on a list, in the folder of a pipeline or of its graphs."""
    index = check_index(folder / INDEX)
    parts = {name for name, told in index.items() if isinstance(told, list)} | _HALVES
    for path in sorted(p for p in folder.iterdir() if p.is_dir()):
        if path.name not in parts:
            raise InputError(
                f"{path.name}/ is not a part of the pipeline",
                where=path,
                expected=", ".join(sorted(parts)),
                next_step="remove the folder, or create the package again",
            )
        _check_part(path)


def check_index(path: Path) -> dict[str, Any]:
    """model_index.json: parts as [library, class] of diffusers and transformers, and known settings."""
    index = read(path)
    if not isinstance(index, dict):
        raise InputError("model_index.json is no object", where=path, expected="parts and settings by name")
    for name, told in index.items():
        if name == "_class_name":
            if not (isinstance(told, str) and _PIPELINE.fullmatch(told)):
                raise InputError(f"_class_name is {told!r}", where=path, expected="a pipeline of diffusers")
        elif isinstance(told, list):
            _check_pair(name, told, path)
        else:
            check({name: told}, dict.fromkeys(_SETTINGS, _SETTING), INDEX, path)
    if "_class_name" not in index:
        raise InputError("model_index.json has no _class_name", where=path, expected="a pipeline of diffusers")
    return index


def _check_pair(name: str, told: list[Any], path: Path) -> None:
    """A part of the pipeline: none, or a class that a library itself has."""
    rules = [(library, classes) for names, library, classes in _PARTS if names.fullmatch(name)]
    if not rules:
        raise InputError(
            f"model_index.json names the part {name!r}, which no pipeline that is packaged has",
            where=path,
            expected="unet, transformer, vae, text encoders, tokenizers, a scheduler",
        )
    if told == [None, None]:
        return
    fits = len(told) == 2 and all(isinstance(word, str) for word in told)
    if not (fits and any(told[0] == library and classes.fullmatch(told[1]) for library, classes in rules)):
        raise InputError(
            f"model_index.json says that {name} is {told!r}",
            where=path,
            expected=" or ".join(f'["{library}", "…"], a class of that library' for library, _ in rules),
            next_step="do not load it: another name is code that a library would import",
        )


def _check_part(folder: Path) -> None:
    """The configuration of one model, tokenizer or scheduler; folders in it are none that a library reads."""
    inner = next((p for p in sorted(folder.iterdir()) if p.is_dir()), None)
    if inner is not None:
        raise InputError(
            f"{folder.name}/{inner.name}/ is a folder in a part of the pipeline",
            where=inner,
            expected="files alone",
        )
    hub.check_files(folder)
    if (folder / "config.json").is_file():
        _check_class(sealed.read_json(folder / "config.json"), folder / "config.json")
    if (folder / SCHEDULER).is_file():
        check_scheduler(folder / SCHEDULER)
    for path in sorted(folder.glob("*.index*.json")):
        _check_shards(path)


def _check_class(config: Mapping[str, Any], where: Path) -> None:
    """diffusers takes the class of a model from its configuration; a list there is a file and a class in it."""
    told = config.get("_class_name")
    if told is not None and not (isinstance(told, str) and _MODEL.fullmatch(told)):
        raise InputError(f"_class_name is {told!r}", where=where, expected="a model of diffusers")


def check_scheduler(path: Path) -> None:
    """scheduler_config.json: numbers, words, and the name of a class of diffusers."""
    config = read(path)
    check(config, {str: _SCHEDULER_VALUE}, SCHEDULER, path)
    hub.check_config(config, path)
    told = config.get("_class_name")
    if not (isinstance(told, str) and re.fullmatch(r"[A-Z]\w*Scheduler", told)):
        raise InputError(f"_class_name is {told!r}", where=path, expected="a scheduler of diffusers")


def _check_shards(path: Path) -> None:
    """Where the tensors of a model in several files are: in files beside their index."""
    shards = sealed.read_json(path).get("weight_map")
    named = shards.values() if isinstance(shards, dict) else [shards]
    wrong = next((n for n in named if not _is_shard(n)), None)
    if wrong is not None or not isinstance(shards, dict):
        raise InputError(
            f"{path.name} says that a tensor is in {wrong!r}",
            where=path,
            expected="plain names of .safetensors files beside it",
        )


def _is_shard(name: object) -> bool:
    return isinstance(name, str) and sealed.plain_name(name) and name.endswith(".safetensors")


def check_picture(path: Path) -> None:
    """InputError for a file that is no PNG, or one that would fill the memory of who opens it."""
    with path.open("rb") as file:
        start = file.read(len(_PNG) + 10)
    sides = [int.from_bytes(start[i : i + 4], "big") for i in (len(_PNG), len(_PNG) + 4)]
    if not (start.startswith(_PNG) and len(start) == len(_PNG) + 10 and start[-2:] == b"\x08\x02"):
        raise InputError(f"{path.name} is no PNG with 8 bits of red, green and blue", where=path)
    if not all(0 < side <= _LARGEST_SIDE for side in sides):
        raise InputError(
            f"{path.name} is a picture of {sides[0]} × {sides[1]} pixels",
            where=path,
            expected=f"at most {_LARGEST_SIDE} along a side",
        )
