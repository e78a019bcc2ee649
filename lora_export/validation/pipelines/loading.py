"""The components of a pipeline as diffusers and transformers build them, in fp32, and their tensors on the disk."""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_export.contracts import Component, Pipeline
from lora_export.errors import CheckpointError, InputError, RuntimeUnavailable
from lora_export.validation.reference.files import Stored, all_headers

_FILE = re.compile(
    r"(?:model|diffusion_pytorch_model)(?P<rest>(?:\.[\w-]+)*?(?:-\d+-of-\d+(?:\.[\w-]+)?)?)\.safetensors"
)


def diffusers_module() -> Any:
    """The library diffusers. RuntimeUnavailable where it is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise RuntimeUnavailable(
            "diffusers is not installed, which runs the unmerged pipeline",
            expected="the extra diffusion",
            next_step="pip install 'lora-export[diffusion]'",
        ) from error
    return diffusers


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, neither library writes to the terminal: deprecations, progress bars, advice to trainers."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import transformers

            transformers.logging.disable_progress_bar()
            diffusers_module().logging.disable_progress_bar()
            yield
    finally:
        logging.disable(before)


def class_of(component: Component) -> Any:
    """The class of a component, which its library exports. InputError for any other name."""
    import transformers

    diffusers = diffusers_module()
    library, kind = (
        (diffusers, diffusers.ModelMixin)
        if component.library == "diffusers"
        else (transformers, transformers.PreTrainedModel)
    )
    found = getattr(library, component.class_name, None)
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise InputError(
            f"{component.library} has no model {component.class_name}",
            where=component.folder / "config.json",
            expected=f"a class that {component.library} {library.__version__} exports",
            next_step=f"pip install --upgrade {component.library}",
        )
    return found


def pipeline_class(pipeline: Pipeline) -> Any:
    """The pipeline's class, which diffusers exports. InputError for any other name."""
    diffusers = diffusers_module()
    found = getattr(diffusers, pipeline.class_name or "", None)
    if isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline):
        return found
    raise InputError(
        f"diffusers has no pipeline {pipeline.class_name}",
        where=pipeline.folder / "model_index.json",
        expected=f"a class that diffusers {diffusers.__version__} exports",
        next_step="pip install --upgrade diffusers",
    )


def load(component: Component, variant: str | None = None) -> Any:
    """A component in fp32, in evaluation mode. CheckpointError if its class needs what its files have not."""
    cls = class_of(component)
    variant = variant if variant is not None and _files(component.folder, variant) else None
    how: dict[str, Any] = {"variant": variant, "use_safetensors": True, "local_files_only": True}
    how["torch_dtype" if component.library == "diffusers" else "dtype"] = torch.float32
    with quiet():
        try:
            model, told = cls.from_pretrained(str(component.folder), output_loading_info=True, **how)
        except (ValueError, RuntimeError, OSError, KeyError) as error:
            raise CheckpointError(
                f"{component.class_name} does not take its weights: {str(error).splitlines()[0][:300]}",
                where=component.folder,
                expected="the weights of the class and the configuration beside them",
            ) from error
    absent = sorted({*told.get("missing_keys", ()), *(str(m) for m in told.get("mismatched_keys", ()))})
    if absent:
        raise CheckpointError(
            f"{len(absent)} tensors are not there, or have another shape",
            where=component.folder,
            tensor=absent[0],
            expected=f"every tensor of a {component.class_name}",
        )
    model = model.float().eval()
    model.requires_grad_(False)
    return model


def stored_tensors(component: Component, variant: str | None = None) -> dict[str, Stored]:
    """Every tensor of a component's files by its name there; of the files of a variant where there are such."""
    names = _files(component.folder, variant) or _files(component.folder, None)
    return {s.name: s for s in all_headers(component.folder) if s.file.name in names}


def _files(folder: Path, variant: str | None) -> set[str]:
    """Names of the weight files with this variant, or without any; with any, where all have one."""
    found: dict[str, str] = {}
    for path in folder.glob("*.safetensors"):
        match = _FILE.fullmatch(path.name)
        if match:
            words = re.sub(r"-\d+-of-\d+", "", match["rest"]).strip(".")
            found[path.name] = words
    chosen = {name for name, words in found.items() if words == (variant or "")}
    return chosen if chosen or variant is not None else set(found)


class Modules:
    """The modules of a model as the base's files call them: transformers builds some classes without the prefix
    that their files have, and some with one more."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._by_path: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self._places: dict[int, list[str]] = {}
        for path, module in self._by_path.items():
            self._places.setdefault(id(module), []).append(path)

    def find(self, name: str) -> tuple[str, nn.Module]:
        """(path, module). InputError where no module, or more than one, can be meant."""
        if name in self._by_path:
            return name, self._by_path[name]
        alike = [p for p in self._by_path if p and (name.endswith(f".{p}") or p.endswith(f".{name}"))]
        longest = max((len(p) for p in alike), default=0)
        nearest = [p for p in alike if len(p) == longest]
        if len(nearest) != 1:
            raise InputError(
                f"{type(self.model).__name__} has {'several modules' if nearest else 'no module'} called so",
                tensor=name,
                expected="one module of the base for each that the adapter trained",
            )
        return nearest[0], self._by_path[nearest[0]]

    def replace(self, module: nn.Module, new: nn.Module) -> None:
        """In all its places: an embedding may stand in two."""
        places = self._places.pop(id(module))
        self._places[id(new)] = places
        for path in places:
            self.model.set_submodule(path, new)
            self._by_path[path] = new
