"""A model of diffusers without its weights, and the checkpoint tensor behind each parameter.

diffusers keeps the names of its modules in its files, so nothing is renamed or fused; but for the attention of old
autoencoders, which its loader renames.
"""

from pathlib import Path
from typing import Any

from lora_export.checkpoint import open_checkpoint
from lora_export.errors import CheckpointError, ExportError
from lora_export.onnx_export.engines.model_without_weights import ModelWithoutWeights

_OLD = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))


def load_without_weights(class_name: str, folder: Path) -> ModelWithoutWeights:
    """The class with the folder's configuration, its parameters on the meta device.

    CheckpointError for a tensor of another shape than the configuration gives its parameter.
    """
    import torch

    cls = diffusers_class(class_name)
    config = cls.load_config(folder, local_files_only=True)
    with torch.device("meta"):
        model = cls.from_config(config).eval().requires_grad_(False)
    object.__setattr__(model, "name_or_path", str(folder))
    stored = open_checkpoint(folder).tensors
    tensors, missing = {}, set()
    for name, value in model.state_dict().items():
        found = next((n for n in _spellings(name) if n in stored), None)
        if found is None:
            missing.add(name)
            continue
        if tuple(stored[found].shape) != tuple(value.shape):
            raise CheckpointError(
                f"the tensor has the shape {list(stored[found].shape)}",
                where=folder,
                tensor=found,
                expected=f"{list(value.shape)}, as config.json says",
            )
        tensors[name] = found
    _refuse_computed(model, tensors, folder)
    return ModelWithoutWeights(model, tensors, frozenset(missing), {}, frozenset(missing))


def diffusers_class(name: str) -> Any:
    """A class of diffusers. ExportError where diffusers is not installed, or does not have it."""
    try:
        import diffusers
    except ImportError as error:
        raise ExportError(
            f"diffusers is not installed, and {name} is its class: {error}",
            expected="the package diffusers",
            next_step="pip install 'lora-export[diffusion]'",
        ) from None
    cls = getattr(diffusers, name, None)
    if cls is None:
        raise ExportError(
            f"diffusers {diffusers.__version__} has no class {name}",
            where="config.json",
            expected="a class of diffusers",
        )
    return cls


def _spellings(name: str) -> list[str]:
    """The names of a tensor in files: as the module is called, or as an old autoencoder had it."""
    parts = name.rpartition(".")
    return [name, *(f"{parts[0].removesuffix(new)}{old}.{parts[2]}" for old, new in _OLD if parts[0].endswith(new))]


def _refuse_computed(model: Any, tensors: Any, folder: Path) -> None:
    """What the class computes for itself has no values on the meta device, and no file has them."""
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in tensors:
            raise ExportError(
                f"{type(model).__name__} computes {name} by itself, and no file has it",
                where=folder,
                tensor=name,
                expected="a model whose tensors are all in its files",
            )
