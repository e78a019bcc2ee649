"""A transformers model without its weights, and the checkpoint tensor behind each parameter.

transformers renames and fuses tensors while it loads. When told to offload a model to disk, it reports where each
parameter is stored: in a checkpoint file under some name; or, if it had to compute the parameter, in a new file.
"""

import contextlib
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.errors import CheckpointError
from lora_export.onnx_export.engines.merged_parameters import intercepted
from lora_export.onnx_export.weights.map import Recipe

if TYPE_CHECKING:
    import torch

SMALL = 2**14  # elements; smaller parameters are read: exporters inspect them (a bias of zeros, a scale)


@dataclass(frozen=True)
class ModelWithoutWeights:
    """model: transformers' own, large parameters on the meta device, small ones and buffers read in fp32.

    tensors: name of each parameter that is exactly one tensor of the checkpoint → the tensor's name there, for
    every name of tied parameters; merged: name of each that consists of lines of several tensors → its recipe;
    computed: names of the others, whose values were read; missing: those of them that no file has.
    """

    model: "torch.nn.Module"
    tensors: Mapping[str, str]
    computed: frozenset[str]
    merged: Mapping[str, Recipe] = field(default_factory=dict)
    missing: frozenset[str] = frozenset()


def load_without_weights(cls: Any, folder: Path, **options: Any) -> ModelWithoutWeights:
    """`cls.from_pretrained(folder, **options)` in evaluation mode, without reading large parameters."""
    import torch

    folder_of_computed = tempfile.TemporaryDirectory(prefix="lora-export-")
    with folder_of_computed as scratch, _without_reading() as places, intercepted() as merged:
        model, info = cls.from_pretrained(
            folder,
            dtype=torch.float32,
            device_map={"": "disk"},
            offload_folder=scratch,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
        tensors, computed = _fill(model.eval(), places, Path(scratch), merged)
    return ModelWithoutWeights(model, tensors, computed, merged, frozenset(info["missing_keys"]) - tensors.keys())


def refuse_missing(model: ModelWithoutWeights, read: Collection[str] | None = None) -> None:
    """CheckpointError for parameters that no file of the folder has, which transformers draws at random.

    read: those that a graph reads, None for all: a pooler that nobody asks for may be missing.
    """
    missing = sorted(model.missing if read is None else model.missing.intersection(read))
    if not missing:
        return
    name = type(model.model).__name__
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    raise CheckpointError(
        f"the folder lacks weights, which {name} would draw at random: {missing[0]}{more}",
        where=str(model.model.name_or_path),
        tensor=missing[0],
        expected=f"every weight of {name}",
        next_step="name the class that the folder was saved from in config.json, or save the model with its head",
    )


@contextlib.contextmanager
def _without_reading() -> Iterator[dict[str, Any]]:
    """Intercept the locations that transformers passes to accelerate, whose hooks would load each layer when it
    runs.

    Tensors keep their type while transformers places them: a cast would read the whole model.
    """
    from transformers import core_model_loading, modeling_utils

    places: dict[str, Any] = {}
    dispatch, materialize = modeling_utils.accelerate_dispatch, core_model_loading._materialize_copy

    def keep(model: Any, quantizer: Any, device_map: Any, folder: Any, index: Any, buffers: Any) -> None:
        places.update(index)

    def mapped(tensor: Any, device: Any = None, dtype: Any = None) -> Any:
        return tensor[...]

    modeling_utils.accelerate_dispatch, core_model_loading._materialize_copy = keep, mapped
    try:
        yield places
    finally:
        modeling_utils.accelerate_dispatch, core_model_loading._materialize_copy = dispatch, materialize


def _fill(
    model: Any, places: Mapping[str, Any], scratch: Path, merged: Mapping[str, Recipe]
) -> tuple[dict[str, str], frozenset[str]]:
    import torch
    from safetensors import safe_open

    tensors: dict[str, str] = {}
    computed: set[str] = set()
    made: dict[tuple[str, str], torch.nn.Parameter] = {}

    def read(file: str, key: str) -> torch.Tensor:
        with safe_open(file, framework="pt") as opened:
            # a copy: files of computed parameters are removed, and mapped memory counts as memory
            return opened.get_tensor(key).to(torch.float32, copy=True)  # type: ignore[no-any-return]

    for prefix, module in model.named_modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            name = f"{prefix}.{leaf}" if prefix else leaf
            place = places.get(name)
            if name in merged:
                continue
            if place is None:
                computed.add(name)
                continue
            file, key = place["safetensors_file"], place["weight_name"]
            own = Path(file).is_relative_to(scratch)
            if own:
                computed.add(name)
            else:
                tensors[name] = key
            if not parameter.is_meta:
                continue
            if (file, key) not in made:  # tied weights are stored once, and stay one parameter
                value = read(file, key) if own or parameter.numel() <= SMALL else parameter.data
                made[file, key] = torch.nn.Parameter(value.reshape(parameter.shape), requires_grad=False)
            module._parameters[leaf] = made[file, key]
        for leaf, buffer in list(module._buffers.items()):
            name = f"{prefix}.{leaf}" if prefix else leaf
            if buffer is not None and buffer.is_meta:
                place = places[name]
                module._buffers[leaf] = read(place["safetensors_file"], place["weight_name"]).to(buffer.dtype)
    return tensors, frozenset(computed)
