"""What the files that other programs read may hold: lists of keys, values, operators and file types.

A runtime does what its configuration says: it loads a library that genai_config.json names, a kernel that
config.json names, a backend that config.pbtxt names. These functions are called before a runtime sees the folder.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_export.allowed import files, genai_config, hub, mlflow_model, modelfile, pipelines, triton_config
from lora_export.allowed.gguf_settings import check_gguf
from lora_export.errors import CheckpointError

__all__ = [
    "check_adapter_folder", "check_gguf", "check_model_folder", "check_onnx_folder", "check_package",
    "check_pipeline_folder",
]  # fmt: skip


def check_model_folder(folder: Path) -> None:
    """A folder that transformers is to load as a model. CheckpointError or InputError for what is not on a list.

    Code beside the weights (modeling_x.py, pytorch_model.bin) is allowed: nothing that is read here leads to it.
    """
    check_adapter_folder(folder)
    if (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            "an adapter lies beside the model, and transformers would silently load both",
            where=folder / "adapter_config.json",
            expected="a model and its adapter in folders of their own",
            next_step="move adapter_config.json and adapter_model.safetensors into another folder",
        )


def check_adapter_folder(folder: Path) -> None:
    """A folder from which only an adapter is loaded, whether or not a model and a tokenizer are beside it; a base
    whose adapter is ignored."""
    hub.check_files(folder)


def check_onnx_folder(folder: Path) -> None:
    """A folder from which a runtime reads graphs, configuration and tokenizer, but nothing in its subfolders."""
    files.refuse_libraries(folder)
    hub.check_files(folder)
    _check_runtimes(folder.iterdir())


def check_pipeline_folder(folder: Path) -> None:
    """A folder that diffusers or Optimum is to load as a pipeline, with the folders of its models."""
    pipelines.check_pipeline(folder)
    for part in sorted(p for p in folder.iterdir() if p.is_dir()):
        files.refuse_libraries(part)


def check_package(folder: Path, also: Sequence[str] = ()) -> None:
    """A package: each of its files is of a known type, and what a runtime reads of it is on a list.

    also: patterns of names that files of its target may have besides.
    """
    files.refuse_strangers(folder, also)
    hub.check_files(folder)
    if (folder / pipelines.INDEX).is_file():
        pipelines.check_pipeline(folder)
    if (folder / pipelines.PICTURE).is_file():
        pipelines.check_picture(folder / pipelines.PICTURE)
    _check_runtimes(folder.rglob("*"))
    for path in sorted(p for p in folder.rglob("*") if p.name in mlflow_model.FILES and p.is_file()):
        mlflow_model.check_file(path)


def _check_runtimes(paths: Iterable[Path]) -> None:
    for path in sorted(p for p in paths if p.is_file()):
        if genai_config.is_config(path.name):
            genai_config.check_config(path)
        elif path.name == genai_config.AUDIO:
            genai_config.check_audio(path)
        elif path.name == genai_config.VISION:
            genai_config.check_vision(path)
        elif path.name == triton_config.NAME:
            triton_config.check_config(path)
        elif path.name == modelfile.NAME:
            modelfile.check_modelfile(path)
