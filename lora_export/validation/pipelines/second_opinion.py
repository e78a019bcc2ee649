"""diffusers' own reading of an adapter file, as a second opinion on names: which module gets which update.

Only on names: diffusers applies another factor to files whose alphas differ, and loads some parts not at all.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import safe_open

from lora_export.contracts import Check, DiffusionAdapter, Pipeline
from lora_export.validation.pipelines.activations import cut
from lora_export.validation.pipelines.loading import pipeline_class
from lora_export.validation.reference.probes import generator_of

NAME = "names_second_opinion"
SAME = 0.02  # of an update: diffusers converts in the file's type, of which bf16 has the widest steps
LONGEST = 160  # characters of its message
Answers = dict[tuple[str, str], torch.Tensor]
_LOW_RANK = frozenset({"lora_down", "lora_up", "alpha"})


def second_opinion(base: Pipeline, adapter: DiffusionAdapter, models: Mapping[str, Any], seed: int) -> Check:
    """Every module's update, asked of the file as it was understood and as diffusers converts it, with one random
    input for each. models: the components, whose paths diffusers' names are."""
    cls = pipeline_class(base) if base.class_name else None
    why = _not_asked(adapter, cls)
    if why:
        return Check(NAME, 0.0, None, True, f"diffusers was not asked: {why}")
    with safe_open(adapter.path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    own = dict(_own(adapter, tensors, seed))
    try:
        theirs = dict(_theirs(cls, tensors, models, seed))
    except Exception as error:  # whatever its converters raise is its opinion
        message = " ".join(str(error).split())[:LONGEST]
        return Check(NAME, 0.0, None, True, f"diffusers refuses the file: {message or type(error).__name__}")
    there = {(c, n) for c, model in models.items() for n, _ in model.named_modules()}
    return _compared(own, {place: answer for place, answer in theirs.items() if place in there})


def _not_asked(adapter: DiffusionAdapter, cls: Any) -> str:
    if cls is None or not hasattr(cls, "lora_state_dict"):
        return "it loads adapters into whole pipelines of some classes"
    if adapter.path.is_dir():
        return "it loads no PEFT folder"
    if adapter.vectors or any(not m.keys.keys() <= _LOW_RANK or m.pieces[0].bare for m in adapter.modules):
        return "it knows plain LoRA alone"
    if len({m.alpha for m in adapter.modules}) > 1:
        return "the alphas of this file differ, for which it has one factor"
    return ""


def _own(adapter: DiffusionAdapter, tensors: Mapping[str, torch.Tensor], seed: int) -> Iterator[Any]:
    for module in adapter.modules:
        down, up = (tensors[module.keys[n]].double().flatten(1) for n in ("lora_down", "lora_up"))
        scale = 1.0 if not module.alpha else module.alpha / len(down)
        for piece in module.pieces:
            answer = up @ (down @ _input(piece.module, down.shape[1], seed)) * scale
            rows = None if piece.rows is None else slice(*piece.rows)
            yield (module.component, piece.module), cut(answer, rows, piece.swap, 0)


def _input(module: str, width: int, seed: int) -> torch.Tensor:
    """By the module's last part: a prefix that one of two spellings lacks must not matter."""
    generator = generator_of(seed, module.rpartition(".")[2])
    return torch.randn(width, generator=generator, dtype=torch.float64)


def _theirs(cls: Any, tensors: Mapping[str, torch.Tensor], models: Mapping[str, Any], seed: int) -> Iterator[Any]:
    from diffusers.utils import state_dict_utils

    names: Any = state_dict_utils
    how = {"unet_config": models["unet"].config} if "unet" in models else {}
    told = cls.lora_state_dict({n: t.clone() for n, t in tensors.items()}, return_alphas=True, **how)
    state, alphas = (told, None) if isinstance(told, dict) else told[:2]
    alpha = next(iter((alphas or {}).values()), None)
    for component in models:
        part = {n.removeprefix(f"{component}."): t for n, t in state.items() if n.startswith(f"{component}.")}
        if not part:
            continue
        if not any("lora_A" in n for n in part):
            if component.startswith("text_encoder"):
                part = names.convert_state_dict_to_peft(names.convert_state_dict_to_diffusers(part))
            else:
                part = names.convert_unet_state_dict_to_peft(part)
        for name, up in part.items():
            if name.endswith(".lora_B.weight"):
                module = name.removesuffix(".lora_B.weight")
                down = part[f"{module}.lora_A.weight"].double().flatten(1)
                scale = 1.0 if alpha is None else float(alpha) / len(down)
                answer = up.double().flatten(1) @ (down @ _input(module, down.shape[1], seed)) * scale
                yield (component, module), answer


def _compared(own: Answers, theirs: Answers) -> Check:
    """One factor for the whole file is theirs to choose."""
    pairs = {place: _same_place(place, theirs) for place in own}
    known = {place: theirs[other] for place, other in pairs.items() if other is not None}
    factor = _factor(own, known)
    different = [
        f"{component}.{name}"
        for (component, name), answer in known.items()
        if not _equal(own[component, name], answer * factor)
    ]
    extra = theirs.keys() - {other for other in pairs.values() if other is not None}
    different += [f"{component}.{name}" for component, name in extra if bool(theirs[component, name].any())]
    absent = len(own) - len(known)
    note = f"diffusers' conversion agrees on {len(known)} modules" if known else "no opinion"
    if different:
        note = f"diffusers gives another update to {different[0]}, and to {len(different) - 1} more"
    if absent:
        note += f"; it does not load {absent} of {len(own)}"
    return Check(NAME, float(len(different)), 0.0, not different, note)


def _same_place(place: tuple[str, str], theirs: Answers) -> tuple[str, str] | None:
    component, name = place
    if place in theirs:
        return place
    alike = [n for c, n in theirs if c == component and (n.endswith(f".{name}") or name.endswith(f".{n}"))]
    return (component, alike[0]) if len(alike) == 1 else None


def _factor(own: Answers, known: Answers) -> float:
    for place, answer in known.items():
        size = float(answer @ answer)
        if size > 0 and answer.shape == own[place].shape:
            return float(own[place] @ answer) / size
    return 1.0


def _equal(own: torch.Tensor, other: torch.Tensor) -> bool:
    if own.shape != other.shape:
        return False
    return float((own - other).norm()) <= SAME * max(float(own.norm()), float(other.norm()))
