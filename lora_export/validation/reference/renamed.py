"""Adapters with the names of another transformers or PEFT, rewritten so that PEFT itself can load them.

PEFT finds modules by the names that they have in the loaded model. An adapter of transformers 4 calls some
otherwise (ViT's `attention.attention.query`, Qwen2-VL's `visual`), and PEFT then finds no layer for it, or leaves
tensors over. A copy of the adapter with today's names is the same adapter: its numbers stay, and each pattern of
its configuration is decided by the old names.
"""

import contextlib
import json
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft.utils import transformers_weight_conversion as conversion
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from lora_export.contracts import AdapterChoice
from lora_export.patterns import bounded, fullmatch
from lora_export.storage.sealed import write_settings
from lora_export.validation.reference.files import ADAPTER_CONFIG, START, adapter_config

_SELECTING = ("exclude_modules", "layers_to_transform", "layers_pattern")  # what is selected is named one by one
_PARAMETERS = ("weight", "bias")
MOST_STRIPPED = 3  # names in front that a model of another class may have


def with_todays_names(
    adapters: Sequence[AdapterChoice], model: torch.nn.Module, scratch: Path
) -> list[AdapterChoice] | None:
    """The adapters, of those with other names than `model` has copies in `scratch` under its names.

    None where a tensor finds no module of the model.
    """
    copies = []
    for i, choice in enumerate(adapters):
        state, config = _read(choice.folder)
        modules = _modules(state, model)
        if modules is None:
            return None
        if all(old == new for old, new in modules.items()):
            copies.append(choice)
            continue
        folder = scratch / f"renamed-{i}"
        folder.mkdir(parents=True, exist_ok=True)
        with bounded("peft", str(choice.folder)):
            write_settings(folder / ADAPTER_CONFIG, _configured(config, state, modules))
        renamed = {f"{START}{_renamed(key, modules)}": tensor for key, tensor in state.items()}
        save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        copies.append(replace(choice, folder=folder))
    return copies


@contextlib.contextmanager
def names_as_they_are() -> Iterator[None]:
    """Inside, PEFT takes the names of an adapter for those of the model, as those of `with_todays_names` are.

    It would put them through transformers' table for older files, whose expressions may match today's names, too:
    of Laguna's `shared_experts.up_proj` they make `shared_experts..up_proj`, of Inkling's `weight_proj` a
    `weight_proj.weight`, and PEFT finds no place for what it has itself saved.
    """
    original = conversion.convert_peft_adapter_state_dict_for_transformers

    def as_it_is(*_: Any, adapter_state_dict: Any, **__: Any) -> Any:
        return adapter_state_dict

    conversion.convert_peft_adapter_state_dict_for_transformers = as_it_is
    try:
        yield
    finally:
        conversion.convert_peft_adapter_state_dict_for_transformers = original


@contextlib.contextmanager
def bone_as_miss(adapters: Sequence[AdapterChoice]) -> Iterator[list[AdapterChoice]]:
    """The adapters, those of Bone as MiSS: PEFT has renamed it. Their folders last as long as this."""
    with contextlib.ExitStack() as folders:
        choices = []
        for choice in adapters:
            config = adapter_config(choice.folder)
            if config.get("peft_type") == "BONE":
                scratch = Path(folders.enter_context(tempfile.TemporaryDirectory(prefix="lora-export-")))
                (scratch / ADAPTER_CONFIG).write_text(json.dumps(config | {"peft_type": "MISS"}), encoding="utf-8")
                for file in choice.folder.glob("*.safetensors"):
                    renamed = {n.replace(".bone_block", ".miss_block"): v for n, v in load_file(file).items()}
                    save_file(renamed, scratch / file.name, {"format": "pt"})
                choice = replace(choice, folder=scratch)
            choices.append(choice)
        yield choices


def _read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors by their names in the model that was trained, configuration)."""
    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("adapter_model*.safetensors")):
        state |= {name.removeprefix(START): tensor for name, tensor in load_file(file).items()}
    return state, adapter_config(folder)


def _modules(names: Iterable[str], model: torch.nn.Module) -> dict[str, str] | None:
    """Module as the adapter calls it → as the model calls it; None if one is not known.

    A tensor belongs to the innermost module that its name begins with: what follows is the adapter kind's own.
    """
    today, places = _todays_name(model), _places(model)
    places_of: dict[str, str] = {}
    left: list[str] = []
    for name in names:
        parts = name.split(".")
        for i in range(len(parts) - 1, 0, -1):
            place = today(".".join(parts[:i]))
            if place is not None:
                places_of[".".join(parts[:i])] = place
                break
        else:
            left.append(name)
    more = _by_prefix(left, places, _text_model(model)) if left else {}
    return None if more is None else places_of | more


def _places(model: torch.nn.Module) -> set[str]:
    """The modules that hold parameters themselves."""
    return {n for n, m in model.named_modules() if n and next(m.parameters(recurse=False), None) is not None}


def _todays_name(model: Any) -> Callable[[str], str | None]:
    """Older path of a module → its path in the model, by transformers' table of renamings; None if it has none."""
    places, parameters = _places(model), model.state_dict()
    table = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]

    def today(path: str) -> str | None:
        if path in places:
            return path
        for leaf in _PARAMETERS:
            name = rename_source_key(f"{path}.{leaf}", table, [], model.base_model_prefix, parameters)[0]
            place: str = name.removesuffix(f".{leaf}")
            if name in parameters and place in places:
                return place
        return None

    return today


def names_in(model: Any, parameters: Mapping[str, torch.Tensor]) -> Callable[[str], str]:
    """The name of a tensor in files, older ones among them → its name among the model's parameters, if any."""
    table = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]

    def today(name: str) -> str:
        if name in parameters:
            return name
        return str(rename_source_key(name, table, [], model.base_model_prefix, dict(parameters))[0])

    return today


def _text_model(model: Any) -> str:
    """The path of the text model inside one that reads images, too; "" where there is none."""
    try:
        text = model.get_decoder()
    except (AttributeError, NotImplementedError):
        return ""
    return next((f"{name}." for name, module in model.named_modules() if name and module is text), "")


def _by_prefix(names: Sequence[str], places: set[str], text: str) -> dict[str, str] | None:
    """The one change of prefix that gives every name a module; of several the one into the text model, whose path
    `text` is. None if there is none, or several that differ."""
    answers = []
    first = names[0].split(".")
    for strip in range(min(MOST_STRIPPED, len(first) - 1) + 1):
        if first[strip].isdecimal():  # the name of a list is no prefix of its layers
            break
        start = "".join(f"{part}." for part in first[:strip])
        ends = {".".join(first[strip:i]) for i in range(strip + 1, len(first))}
        added = {p[: -len(end)] for p in places for end in ends if p == end or p.endswith(f".{end}")}
        for add in added:
            answer = _all_changed(names, start, add, places)
            if answer is not None and answer not in answers:
                answers.append(answer)
    if len(answers) > 1:
        answers = [a for a in answers if text and all(place.startswith(text) for place in a.values())]
    return answers[0] if len(answers) == 1 else None


def _all_changed(names: Sequence[str], start: str, add: str, places: set[str]) -> dict[str, str] | None:
    changed = {}
    for name in names:
        if not name.startswith(start):
            return None
        rest = name.removeprefix(start).split(".")
        place = next((p for i in range(len(rest), 0, -1) if (p := add + ".".join(rest[:i])) in places), None)
        if place is None:
            return None
        changed[start + place.removeprefix(add)] = place
    return changed


def _module_of(name: str, modules: Mapping[str, str]) -> str:
    parts = name.split(".")
    return next(p for i in range(len(parts), 0, -1) if (p := ".".join(parts[:i])) in modules)


def _renamed(name: str, modules: Mapping[str, str]) -> str:
    old = _module_of(name, modules)
    return modules[old] + name.removeprefix(old)


def _configured(config: Mapping[str, Any], names: Collection[str], modules: Mapping[str, str]) -> dict[str, Any]:
    """The configuration with every name and pattern decided by the old names, and written with the new ones."""
    owned = [(old, name.removeprefix(f"{old}.")) for name in names for old in (_module_of(name, modules),)]
    tokens = {old for old, rest in owned if "trainable_tokens" in rest}
    trained = {old for old, rest in owned if rest not in _PARAMETERS} - tokens
    saved = {old for old, rest in owned if rest in _PARAMETERS and _is_saved(old, config)}
    changed = dict(config) | {key: None for key in _SELECTING if config.get(key) is not None}
    changed["target_modules"] = sorted(modules[o] for o in trained)
    if saved:
        changed["modules_to_save"] = sorted(modules[o] for o in saved)
    forward = config.get("feedforward_modules")
    if forward is not None:
        changed["feedforward_modules"] = sorted(modules[o] for o in trained if _chosen(o, forward))
    for key, pattern in config.items():
        if key.endswith("_pattern") and isinstance(pattern, dict):
            changed[key] = _patterns(pattern, trained, modules)
    indices = config.get("trainable_token_indices")
    if isinstance(indices, dict):
        changed["trainable_token_indices"] = {
            next((modules[o] for o in sorted(tokens) if _same_end(o, name)), name): ids
            for name, ids in indices.items()
        }
    return changed


def _is_saved(module: str, config: Mapping[str, Any]) -> bool:
    """Whether a module was saved whole: it, or one around it, is in modules_to_save."""
    owners = [".".join(module.split(".")[:i]) for i in range(1, module.count(".") + 2)]
    return any(_same_end(owner, name) for owner in owners for name in config.get("modules_to_save") or ())


def _same_end(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _chosen(path: str, names: Any) -> bool:
    """As PEFT chooses: an expression for the whole path, or a list of its last parts."""
    if isinstance(names, str):
        return fullmatch(names, path) is not None
    return any(_same_end(path, name) for name in names)


def _patterns(pattern: Mapping[str, Any], trained: Iterable[str], modules: Mapping[str, str]) -> dict[str, Any]:
    """Each trained module's value under its new path; AdaLoRA's, which name tensors, under the tensor's new name.

    Longer paths come first: PEFT takes the first that a path ends with.
    """
    renamed: dict[str, Any] = {}
    for old in sorted(trained, key=lambda o: (-len(modules[o]), o)):
        key = get_pattern_key(list(pattern), old)
        if key in pattern:
            renamed[re.escape(modules[old])] = pattern[key]
    named = {k: v for k, v in pattern.items() if isinstance(v, list)}
    return renamed | {_renamed(k.removeprefix(START), modules): v for k, v in named.items()}
