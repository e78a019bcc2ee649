"""The weights of sentence-transformers' modules, beside those of the model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lora_export.checkpoint.header import read_header
from lora_export.checkpoint.tensor_files import TensorFiles
from lora_export.contracts import TensorInfo, TensorSource
from lora_export.sentence_modules import weight_files
from lora_export.storage.sealed import refuse_outward_link


def module_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Tensors of the folders that modules.json names, as `2_Dense.linear.weight`; none without modules.

    CheckpointError for a damaged file, or for weights that are pickled; InputError for a link out of the folder.
    """
    tensors = {}
    for path, file in weight_files(folder).items():
        refuse_outward_link(file, folder)
        for name, info in read_header(file).tensors.items():
            tensors[f"{path}.{name}"] = replace(info, name=f"{path}.{name}")
    return tensors


def with_modules(source: TensorSource, folder: Path) -> TensorSource:
    """The tensors of a model and of the modules in its folder."""
    beside = module_tensors(folder)
    if not beside:
        return source
    tensors = {**source.tensors, **beside}
    return replace(source, tensors=tensors) if isinstance(source, TensorFiles) else _Joined(tensors, source)


@dataclass(frozen=True)
class _Joined(TensorSource):
    """tensors: each with its own source; first: the one that may know hashes."""

    tensors: Mapping[str, TensorInfo]
    first: TensorSource

    def known_hash(self, name: str) -> str | None:
        return self.first.known_hash(name) if name in self.first.tensors else None
