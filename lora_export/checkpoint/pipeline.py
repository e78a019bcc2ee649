"""A pipeline of diffusers, opened by model_index.json and the headers of its models; nothing in it is run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.checkpoint.reader import Checkpoint, open_checkpoint, refuse_code
from lora_export.checkpoint.weight_files import PICKLED, variants_in, weight_files
from lora_export.contracts import Component, Pipeline
from lora_export.contracts.pipelines import Library
from lora_export.errors import CheckpointError, InputError, LoraExportError
from lora_export.storage.sealed import LARGEST_SETTINGS, plain_name, read_json

INDEX = "model_index.json"
_ROLES = (("UNet", "unet"), ("Transformer", "transformer"), ("Autoencoder", "vae"))


def is_pipeline(folder: Path) -> bool:
    """Whether this is a folder of components, or a model of diffusers alone."""
    if (folder / INDEX).is_file():
        return True
    try:
        return "_class_name" in read_json(folder / "config.json", limit=LARGEST_SETTINGS)
    except LoraExportError:  # none, or one that whoever opens the model refuses
        return False


def open_pipeline(folder: Path) -> Pipeline:
    """The components of a pipeline, or of a model of diffusers that stands alone. CheckpointError for an index that
    names code, a folder outside, or a component that is not there."""
    if not folder.is_dir():
        raise InputError("there is no such folder", where=folder, expected="a folder with model_index.json")
    if not (folder / INDEX).is_file():
        config = read_json(folder / "config.json", limit=LARGEST_SETTINGS)
        class_name = _class(config.get("_class_name"), folder / "config.json")
        name = next((role for part, role in _ROLES if part in class_name), "model")
        return Pipeline(folder, None, {name: _component(name, folder, "diffusers", class_name)})
    where = folder / INDEX
    index = read_json(where, limit=LARGEST_SETTINGS)
    refuse_code({k: v for k, v in index.items() if k != "_class_name"}, where)
    class_name = _class(index.get("_class_name"), where)
    components, others = {}, []
    for name, told in index.items():
        if not (isinstance(told, list) and len(told) == 2):
            continue  # settings of the pipeline itself
        if told == [None, None]:
            continue
        library, part_class = _told(name, told, where)
        part = folder / name
        if not part.is_dir():
            raise CheckpointError(
                f"the component {name} is not there",
                where=where,
                expected=f"the folder {part}",
                next_step="download the pipeline again",
            )
        model = library in ("diffusers", "transformers") and (part / "config.json").is_file()
        if model and (_has_weights(part) or _pickled(part)):
            kind: Library = "diffusers" if library == "diffusers" else "transformers"
            components[name] = _component(name, part, kind, part_class)
        else:
            others.append(name)
    if not components:
        raise CheckpointError(
            "the pipeline has no model with weights", where=where, expected="unet/ or transformer/"
        )
    return Pipeline(folder, class_name, components, tuple(others), index)


def open_component(component: Component, variant: str | None = None) -> Checkpoint:
    """The checkpoint of a component, with the weights of a variant where the component has such."""
    return open_checkpoint(component.folder, variant if variant in variants_in(component.folder) else None)


def refuse_missing_variant(pipeline: Pipeline, variant: str | None) -> None:
    """InputError for a variant that no component has."""
    folders = [c.folder for c in pipeline.components.values()]
    if variant is not None and not any(variant in variants_in(folder) for folder in folders):
        weight_files(folders[0], variant)  # says which there are


def _has_weights(folder: Path) -> bool:
    return any(p.suffix == ".safetensors" or ".safetensors.index." in p.name for p in folder.iterdir())


def _pickled(folder: Path) -> bool:
    return any(p.suffix in PICKLED for p in folder.iterdir())


def _component(name: str, folder: Path, library: Library, class_name: str) -> Component:
    config: Mapping[str, Any] = read_json(folder / "config.json", limit=LARGEST_SETTINGS)
    refuse_code({k: v for k, v in config.items() if k != "_class_name"}, folder / "config.json")
    own = config.get("_class_name") if library == "diffusers" else (config.get("architectures") or [None])[0]
    return Component(name, folder, library, _class(own or class_name, folder / "config.json"), config)


def _class(told: object, where: Path) -> str:
    if isinstance(told, str) and told.isidentifier():
        return told
    raise CheckpointError(
        f"_class_name is {told!r}",
        where=where,
        expected="the name of a class of diffusers; a file beside it would be code that came with the model",
    )


def _told(name: str, told: list[object], where: Path) -> tuple[str, str]:
    library, class_name = told
    words = isinstance(library, str) and isinstance(class_name, str)
    if words and plain_name(name) and str(library).isidentifier() and str(class_name).isidentifier():
        return str(library), str(class_name)
    raise CheckpointError(
        f"the component {name!r} is {told!r}",
        where=where,
        expected='the plain name of a folder, and ["library", "ClassName"]; other entries name code',
    )
