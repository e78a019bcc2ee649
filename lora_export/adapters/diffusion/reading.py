"""An adapter of an image model understood: every tensor claimed by one module, or refused by name."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from lora_export.adapters.diffusion.endings import grouped, refuse_incomplete
from lora_export.adapters.diffusion.finding import Finder, Place, Shapes, component_of
from lora_export.adapters.diffusion.kinds import kind_of
from lora_export.adapters.diffusion.metadata import PEFT_JSON, Alphas, configurations
from lora_export.adapters.diffusion.strangers import refuse_empty, refuse_other, refuse_strangers, vectors
from lora_export.adapters.kind import AdapterFile
from lora_export.contracts import DiffusionAdapter, Pipeline, TrainedModule
from lora_export.contracts.pipelines import AdapterFormat
from lora_export.patterns import TOTAL, within

__all__ = ["component_of", "understand"]

Groups = Mapping[str, Mapping[str, str]]
SplitAlpha = Literal["file", "trained"] | None
_LORA_PARTS = frozenset({"lora_down", "lora_up", "lora_up_bias", "magnitude", "alpha"})
_OLD = re.compile(r"_lora\.(?:down|up)\.weight$|\.lora\.(?:down|up)\.weight$|lora_linear_layer")


def understand(
    file: AdapterFile, metadata: Mapping[str, str], pipeline: Pipeline, shapes: Shapes, split_qkv_alpha: SplitAlpha
) -> DiffusionAdapter:
    """What each tensor of a file changes in a pipeline.

    file: a single file (its `config` is empty) or PEFT's folder; metadata: of its header; shapes: of the tensors of
    each component of the pipeline, by their names. AdapterError, before any weight is read, for a tensor that finds
    no weight, half a pair, two spellings of one weight, a spelling of several, a component that the pipeline does
    not have, an alpha that nothing can mean, and files of another nature.
    """
    with within(TOTAL, str(file.where)):
        if not file.tensors:
            raise file.refuse("the adapter holds no tensors", expected="trained matrices")
        refuse_empty(file)
        if file.config:
            return _peft_folder(file, metadata, pipeline, shapes, split_qkv_alpha)
        refuse_strangers(file)
        groups, others = grouped(file, file.tensors)
        embedded = vectors(file, others, shapes)
        if len(embedded) < len(others):
            raise refuse_other(file, set(others) - set(embedded))
        configs = configurations(file, metadata)
        alphas = Alphas(file, metadata, configs, split_qkv_alpha)
        modules, unused = _modules(file, groups, Finder(file, pipeline, shapes), alphas, shapes)
        if unused:
            alphas.warnings.append(f"{len(unused)} tensors belong to factors of zeros that no tool applies")
        return DiffusionAdapter(
            path=file.folder,
            format=format_of(groups, metadata),
            weight=file.weight,
            modules=modules,
            kinds=_kinds(modules),
            metadata=dict(metadata),
            config=configs,
            vectors=tuple(embedded),
            unused=unused,
            warnings=tuple(alphas.warnings),
        )


def _peft_folder(
    file: AdapterFile, metadata: Mapping[str, str], pipeline: Pipeline, shapes: Shapes, split: SplitAlpha
) -> DiffusionAdapter:
    """PEFT's own folder: of one component. What is no plain LoRA is left to the kinds of adapters/."""
    component = component_of(file, shapes, pipeline)
    groups, others = grouped(file, file.tensors)
    kind = str(file.config.get("peft_type"))
    plain = kind == "LORA" and not others and all(keys.keys() <= _LORA_PARTS for keys in groups.values())
    modules: tuple[TrainedModule, ...] = ()
    if plain and not _starts_elsewhere(file.config):
        alphas = Alphas(file, metadata, {component: file.config}, split)
        modules, _ = _modules(file, groups, Finder(file, pipeline, shapes, only=component), alphas, shapes)
    kinds = _kinds(modules) if modules else {kind.lower(): len(groups) or 1}
    return DiffusionAdapter(file.folder, "peft", file.weight, modules, kinds, dict(metadata), file.config)


def _starts_elsewhere(config: Mapping[str, Any]) -> bool:
    """Whether PEFT took a first value of the adapter out of the base: adapters/lora.py knows what to do."""
    start = config.get("init_lora_weights")
    return isinstance(start, str) and start.lower().startswith(("pissa", "olora"))


def _modules(
    file: AdapterFile, groups: Groups, finder: Finder, alphas: Alphas, shapes: Shapes
) -> tuple[tuple[TrainedModule, ...], tuple[str, ...]]:
    """The trained modules of a file in its order, and tensors of zeros that belong to none."""
    places: dict[str, Place] = {}
    unknown: dict[str, str] = {}
    for spelling, keys in groups.items():
        tensor = next(iter(keys.values()))
        place = finder.find(_parameter(spelling, keys), tensor)
        if place is None:
            unknown[spelling] = tensor
        else:
            places[spelling] = place
    leftovers = _leftovers(file, groups, unknown)
    for spelling in leftovers:
        del unknown[spelling]
    if unknown:
        raise finder.refuse_unknown(unknown, len(groups))
    _refuse_twice(file, groups, places)
    made = []
    for spelling, place in places.items():
        keys = groups[spelling]
        refuse_incomplete(file, spelling, keys)
        _refuse_rows(file, spelling, keys, place, shapes[place.component])
        alpha = alphas.of(place, keys)
        parts = {part: key for part, key in keys.items() if part != "alpha"}
        made.append(TrainedModule(spelling, place.component, place.pieces, parts, alpha, keys.get("alpha")))
    return tuple(made), tuple(key for spelling in leftovers for key in groups[spelling].values())


def _parameter(spelling: str, keys: Mapping[str, str]) -> str:
    """Wan's modulation is a parameter of a block, and its difference is called as the block is: blocks.0.diff_m."""
    if "diff_m" not in keys or spelling.endswith("modulation"):
        return spelling
    flat = "." not in spelling and "_" in spelling
    return f"{spelling}{'_' if flat else '.'}modulation"


def _leftovers(file: AdapterFile, groups: Groups, unknown: Mapping[str, str]) -> list[str]:
    """diffusers 0.15 saved four LoRAs for each projection of a text encoder, of which it used one and left three
    untrained: those are zero, and are told by that."""
    found = []
    for spelling in unknown:
        match = re.search(r"self_attn\.(q|k|v|out)_proj\.to_(q|k|v|out)$", spelling)
        keys = groups[spelling]
        if match and match[1] != match[2] and "lora_up" in keys:
            if bool(file.source.read(keys["lora_up"]).any()):
                raise file.refuse(
                    f"{spelling} is a LoRA of a projection that diffusers never applied, and is not zero",
                    tensor=keys["lora_up"],
                    expected="zeros",
                )
            found.append(spelling)
    return found


def _refuse_twice(file: AdapterFile, groups: Groups, places: Mapping[str, Place]) -> None:
    """Two spellings of one weight: which of them is meant, or whether their sum is, nothing says."""
    seen: dict[tuple[str, str], str] = {}
    for spelling, place in places.items():
        for piece in place.pieces:
            weight = (place.component, piece.module)
            if weight in seen:
                raise file.refuse(
                    f"{seen[weight]} and {spelling} are two spellings of one weight, {'.'.join(weight)}",
                    tensor=next(iter(groups[spelling].values())),
                    expected="one of them",
                )
            seen[weight] = spelling


def _rows(place: Place, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The rows of a trained weight that lies in several; None where it is one weight."""
    return place.pieces[-1].rows[1] if place.pieces[-1].rows else None


def _refuse_rows(
    file: AdapterFile, spelling: str, keys: Mapping[str, str], place: Place, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """AdapterError where a fused weight of the adapter is not as high as the base's weights together."""
    rows = _rows(place, shapes)
    if rows is None:
        return
    tucker = "hada_t1" in keys
    for part, dimension in (("lora_up", 0), ("diff", 0), ("diff_b", 0), ("hada_w1_a", int(tucker))):
        if part not in keys:
            continue
        shape = file.tensors[keys[part]].shape
        if len(shape) <= dimension or shape[dimension] != rows:
            modules = ", ".join(p.module for p in place.pieces)
            raise file.refuse(
                f"the shape is {list(shape)}, and {spelling} has {rows} rows in the base: {modules}",
                tensor=keys[part],
                expected="an adapter of this kind and size of model",
            )


def _kinds(modules: Iterable[TrainedModule]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for module in modules:
        kind = kind_of(module)
        counts[kind] = counts.get(kind, 0) + 1
    return counts


def format_of(groups: Groups, metadata: Mapping[str, str]) -> AdapterFormat:
    """Who wrote a file, by what its names have that others' have not."""
    spellings = list(groups)
    tensors = [key for keys in groups.values() for key in keys.values()]

    def any_starts(*prefixes: str) -> bool:
        return any(s.startswith(prefixes) for s in spellings)

    if any_starts("lycoris_"):
        return "lycoris"
    if any_starts("lora_transformer_"):
        return "onetrainer"
    if any_starts("lora_unet_", "lora_te", "oft_unet_", "oft_te", "lora_prior_"):
        return "kohya"
    if any(".processor." in s and "_lora" in s for s in spellings):
        return "xlabs"
    if any(t.endswith("_norm.scale") for t in tensors):
        return "bfl"
    if any(_OLD.search(t) for t in tensors):
        return "diffusers-old"
    if any_starts("base_model.model."):
        return "peft"
    if any(key.endswith(".lora_alpha") for key in metadata) and PEFT_JSON not in metadata:
        return "simpletuner"
    if any_starts("diffusion_model.", "double_blocks.", "single_blocks.", "joint_blocks.", "text_encoders."):
        return "original"
    return "diffusers"
