"""A base or adapter as a user names it: a folder, a file, or a Hub ID with an optional revision."""

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from lora_export.checkpoint.gguf import ENDING, gguf_file
from lora_export.contracts import AdapterChoice, Source
from lora_export.errors import InputError
from lora_export.storage.documents import is_text

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
SAFETENSORS = ".safetensors"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.md", "LICENSE*"]

Model = str | Path  # a folder, or a Hub ID
AdapterReference = Model | tuple[Model, float] | AdapterChoice  # a string may end in its weight, as in NAME:0.7
Adapters = Model | AdapterChoice | Sequence[AdapterReference]


def resolve(model: Model, *, single: bool = False) -> Source:
    """The folder behind a name. A Hub ID is downloaded (or read from the cache) and pinned to a commit.

    single: an adapter may be one .safetensors file. InputError for what is not there, and for a model in one file.
    """
    refuse_unreadable(model)
    name, folder = str(model), Path(model)
    if folder.is_dir():
        return Source(name, folder)
    if folder.suffix == ENDING and folder.is_file():
        gguf_file(folder.parent)  # the only one there
        return Source(name, folder.parent)
    if folder.suffix == SAFETENSORS and folder.is_file():
        if single:
            return Source(name, folder)
        raise InputError(
            "this is a single file, and a model is a folder here",
            where=folder,
            expected="a folder with config.json, or with model_index.json",
            next_step="an adapter goes to -a; of a checkpoint in one file, diffusers makes a folder: "
            "from_single_file(FILE).save_pretrained(DIR)",
        )
    match = _HUB_ID.fullmatch(name)
    if match is None or folder.exists():
        raise InputError(
            "there is no such folder, and this is not a valid Hub ID",
            where=name,
            expected="a folder, or owner/name, or owner/name@revision",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        snapshot = Path(snapshot_download(match["repo"], revision=match["revision"], allow_patterns=_PATTERNS))
    except LocalEntryNotFoundError:
        raise InputError(
            "there is no such folder, and the Hub cannot be reached, nor is it in the local cache",
            where=name,
            expected="a folder, or a Hub ID that can be downloaded",
            next_step="check the path; with a network: unset HF_HUB_OFFLINE",
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(
            f"the Hub refuses the download: {str(error).splitlines()[0]}",
            where=name,
            expected="a Hub ID that can be downloaded",
            next_step="check the name; for a gated model: hf auth login",
        ) from None
    # The cache keeps a snapshot in a folder that is named after its commit.
    return Source(name, snapshot, snapshot.name if _COMMIT.fullmatch(snapshot.name) else None)


def refuse_unreadable(path: str | os.PathLike[str]) -> None:
    """InputError for a path that is not UTF-8, also behind a link: JSON cannot name it, and the libraries that read
    models refuse it."""
    name = os.fspath(path)
    whole = os.path.realpath(name) if isinstance(path, os.PathLike) or Path(name).exists() else name
    if not (is_text(name) and is_text(whole)):
        raise InputError(
            "the path is not UTF-8",
            where=whole,
            expected="folders with UTF-8 names",
            next_step="rename the folder",
        )


def adapter_choices(adapters: Adapters) -> list[AdapterChoice]:
    """Each adapter found, with its weight. A single one need not stand in a list.

    A string may end in its weight, as in A:0.7; without one it is 1. A folder whose own name ends so is taken as it
    is.
    """
    several = [adapters] if isinstance(adapters, str | Path | AdapterChoice) else adapters
    return [_choice(adapter) for adapter in several]


def _choice(adapter: AdapterReference) -> AdapterChoice:
    if isinstance(adapter, AdapterChoice):
        return adapter
    model, weight = adapter if isinstance(adapter, tuple) else (adapter, 1.0)
    if isinstance(adapter, str) and not Path(adapter).exists():
        name, _, tail = adapter.rpartition(":")
        with contextlib.suppress(ValueError):  # then the colon belongs to the name
            model, weight = (name, float(tail)) if name else (adapter, 1.0)
    source = resolve(model, single=True)
    return AdapterChoice(source.folder, float(weight), source.name, source.commit)
