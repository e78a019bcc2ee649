"""A checkpoint folder opened by its headers, and tensors read from it by byte range."""

import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lora_export.allowed import hub
from lora_export.checkpoint.gguf import gguf_file, read_gguf
from lora_export.checkpoint.header import read_header
from lora_export.checkpoint.weight_files import PICKLED, PLAIN, WeightFiles, weight_files
from lora_export.contracts import TensorInfo, TensorSource
from lora_export.errors import CheckpointError, InputError
from lora_export.storage.documents import decode
from lora_export.storage.sealed import LARGEST_SETTINGS, plain_name, read_json, refuse_outward_link

LONGEST_FILE_NAME = 128  # characters, up to four bytes each, where most file systems end at 255 bytes


@dataclass(frozen=True)
class ModelSettings:
    """The fields of a config.json whose types are checked here; the rest may hold what JSON has no type for."""

    architectures: tuple[str, ...] | None = None
    quantization_config: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Checkpoint(TensorSource):
    """A model folder: its tensors, which may come from elsewhere; config.json; the metadata of its files, and their
    names."""

    tensors: Mapping[str, TensorInfo]
    folder: Path
    config: Mapping[str, Any]
    metadata: Mapping[str, str]
    files: WeightFiles = PLAIN

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def model_types(self) -> frozenset[str]:
        """Every model_type of the configuration: that of the model and those of its parts (encoder, decoder)."""
        return frozenset(_model_types(self.config))


def _model_types(config: Mapping[str, Any]) -> Iterator[str]:
    if isinstance(config.get("model_type"), str):
        yield config["model_type"]
    for value in config.values():
        if isinstance(value, dict):
            yield from _model_types(value)


def open_checkpoint(folder: Path, variant: str | None = None) -> Checkpoint:
    """Open a model folder of transformers or diffusers by config.json and safetensors headers; no weight is read.

    variant: of its weights, such as fp16; None: as `weight_files` chooses.
    """
    if not folder.is_dir():
        raise InputError(
            "there is no such folder",
            where=folder,
            expected="a model folder with config.json and safetensors files",
            next_step="give a folder, or a hub id such as owner/name",
        )
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise InputError("this folder is an adapter, not a base model", where=folder, next_step="swap -b and -a")
    gguf = gguf_file(folder)
    config = read_json(folder / "config.json", limit=LARGEST_SETTINGS)
    refuse_code(config, folder / "config.json")
    typed = {f.name: config[f.name] for f in fields(ModelSettings) if f.name in config}
    decode(typed, ModelSettings, "the configuration", folder / "config.json")
    if gguf is not None:
        read = read_gguf(gguf)
        told = {"quant_method": "gguf", "architecture": read.settings.get("general.architecture")}
        return Checkpoint(read.tensors, folder, {**config, "quantization_config": told}, {})
    named = weight_files(folder, variant)
    tensors, metadata = read_tensors(folder, named.single, named.index)
    return Checkpoint(tensors, folder, config, metadata, named)


def read_tensors(folder: Path, single: str, index: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of one safetensors file, or of the shards that an index names."""
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for shard, names in _shards(folder, single, folder / index).items():
        header = read_header(_regular(folder / shard))
        _check_index(folder / index, shard, names, set(header.tensors))
        tensors |= header.tensors
        metadata |= header.metadata
    return tensors, metadata


def _shards(folder: Path, single: str, index: Path) -> dict[str, set[str] | None]:
    """Shard file names, with the tensors that the index promises in each (None where there is no index)."""
    if (folder / single).is_file():
        return {single: None}
    if not index.is_file():
        raise _no_weights(folder)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("the index has no weight_map", where=index)
    shards: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if isinstance(name, str) and name in shards:
            shards[name].add(tensor)
            continue
        if not isinstance(name, str) or not plain_name(name) or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"the index points to {name!r}",
                where=index,
                tensor=tensor,
                expected="the plain name of a .safetensors file in the same folder",
            )
        if len(name) > LONGEST_FILE_NAME or not (folder / name).is_file():
            raise CheckpointError(
                f"the index names the shard {name}, which is not there",
                where=index,
                tensor=tensor,
                expected=f"the file {folder / name}",
                next_step="download the missing shard",
            )
        shards[name] = {tensor}
    return dict(sorted(shards.items()))


def _check_index(index: Path, shard: str, promised: set[str] | None, found: set[str]) -> None:
    if promised is None or promised == found:
        return
    missing, extra = sorted(promised - found), sorted(found - promised)
    raise CheckpointError(
        f"the index and the shard {shard} disagree: {len(missing)} tensors missing, {len(extra)} not in the index",
        where=index,
        tensor=(missing or extra)[0],
        expected="each tensor in exactly the shard that the index names",
        next_step="download the checkpoint again",
    )


def _regular(path: Path) -> Path:
    refuse_outward_link(path)
    if not stat.S_ISREG(path.stat().st_mode):
        raise CheckpointError("not a regular file", where=path)
    return path


def _no_weights(folder: Path) -> CheckpointError:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLED)
    if pickles:
        return CheckpointError(
            f"only pickled weights here ({', '.join(pickles[:3])}), which can run code when they are loaded",
            where=folder / pickles[0],
            expected="safetensors",
            next_step="load it once where you trust it and save it again: model.save_pretrained(DIR)",
        )
    return CheckpointError("no weights here", where=folder, expected=f"{PLAIN.single} or {PLAIN.index}")


def refuse_code(config: Any, where: Path) -> None:
    """Refuse a config that would make transformers run code which came with the model, at any depth."""
    hub.check_config(config, where)
