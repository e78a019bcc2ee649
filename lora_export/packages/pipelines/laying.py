"""The files of a pipeline in a package: merged weights as diffusers reads them, or graphs as Optimum does.

Tokenizers and schedulers are copied byte for byte. What transformers 5 has saved stops 4.57, with which Optimum
runs: there, and only there, a spelling that both read replaces it.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_export.contracts import ExportResult
from lora_export.errors import InputError
from lora_export.folder_files import TOKENIZER_FILES
from lora_export.packages.companions import tokenizer_for_both
from lora_export.packages.job import Run
from lora_export.storage import sealed

INDEX, CERTIFICATE = "model_index.json", "lora_export_certificate.json"
_CONFIG, _TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
_SETTINGS = TOKENIZER_FILES | {"preprocessor_config.json", "scheduler_config.json"}
_WEIGHTS = re.compile(r"(model|diffusion_pytorch_model)[\w.-]*\.safetensors(\.index(\.[\w-]+)?\.json)?", re.ASCII)
_DENOISER = re.compile(  # in the package, or in the run
    r"(?:merged/)?(unet|transformer)/diffusion_pytorch_model(\.([\w-]+?))?(-\d{5}-of-\d{5})?\.safetensors", re.ASCII
)
# Class of transformers → the files without which 4.57 needs its fast variant.
_SLOW: Mapping[str, frozenset[str]] = {
    "CLIPTokenizer": frozenset({"vocab.json", "merges.txt"}),
    "T5Tokenizer": frozenset({"spiece.model"}),
}
# What works on a finished picture, in PyTorch, and has no graph.
_CHECKER, _ASKED_FOR = "safety_checker", "requires_safety_checker"


def lay_merged(run: Run, stage: Path) -> None:
    """The merged pipeline, with the certificates of its components."""
    assert run.merged is not None
    for name in (INDEX, CERTIFICATE):
        sealed.copy(run.merged / name, stage / name)
    for part in parts_in(run.config):
        _copy(run.merged / part, stage / part, lambda n: n in _SETTINGS or _is_of_model(n))


def _is_of_model(name: str) -> bool:
    return name in (_CONFIG, CERTIFICATE) or _WEIGHTS.fullmatch(name) is not None


def lay_graphs(export: ExportResult, stage: Path) -> None:
    """The graphs of a pipeline in Optimum's folders, each with its configuration; scheduler and tokenizers."""
    import onnx_ir as ir  # takes a second, and manifests of packages are read without it

    from lora_export.packages import graphs

    index = sealed.read_json(export.output / INDEX)
    for path in export.paths:
        target = stage / path.parent.relative_to(export.output)
        target.mkdir()
        graphs.save(ir.load(path), target / path.name, f"{path.name}_data")
        sealed.copy(path.parent / _CONFIG, target / _CONFIG)
    models = {path.parent.name for path in export.paths}
    for part in parts_in(index):
        if (export.output / part).is_dir() and part not in models:
            _copy(export.output / part, stage / part, _SETTINGS.__contains__)
    wanted = index | {part: _for_4(stage / part, index[part]) for part in parts_in(index)}
    if has_checker(index):
        wanted |= {_CHECKER: [None, None], _ASKED_FOR: False}
    if wanted != index:
        sealed.write_settings(stage / INDEX, wanted)
    else:
        sealed.copy(export.output / INDEX, stage / INDEX)


def _for_4(folder: Path, told: list[Any]) -> list[Any]:
    """What the index should say of a tokenizer; its settings are written anew where 4.57 cannot read them."""
    path = folder / _TOKENIZER_CONFIG
    if not path.is_file():
        return told
    settings = sealed.read_json(path)
    if isinstance(settings.get("extra_special_tokens"), list):
        sealed.write_settings(path, tokenizer_for_both(settings))
    library, name = told
    there = {p.name for p in folder.iterdir()}
    fast = name in _SLOW and not _SLOW[name] <= there and "tokenizer.json" in there
    return [library, f"{name}Fast"] if fast else told


def _copy(source: Path, target: Path, wanted: Callable[[str], bool]) -> None:
    """The files of a part whose names are wanted."""
    if not source.is_dir():
        raise InputError(
            f"the pipeline has no folder {source.name}", where=source.parent, expected="each part of its index"
        )
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.is_file() and wanted(path.name):
            sealed.copy(path, target / path.name, source.parent)


def parts_in(index: Mapping[str, Any]) -> Iterator[str]:
    """The names of the parts that a pipeline has."""
    return (name for name, told in index.items() if isinstance(told, list) and told != [None, None])


def has_checker(index: Mapping[str, Any]) -> bool:
    """Whether diffusers would look at each picture, and blacken some."""
    return _CHECKER in parts_in(index)


def weights_of(files: Iterable[str]) -> str:
    """The variant in the names of a pipeline's weights, such as fp16; '' for none."""
    found = (match for name in sorted(files) if (match := _DENOISER.fullmatch(name)))
    return next((match[3] or "" for match in found), "")
