"""Adapters of every kind: their configuration, and the names, shapes and values of their tensors."""

import json
import tempfile
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st

from lora_export.checkpoint import open_checkpoint
from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.errors import LoraExportError
from lora_export.merging import MergePlan, plan
from lora_export.merging.architecture.model import loaded_weights
from lora_export.workflows.inspection import inspect_folder
from tests.fuzz import adapters
from tests.fuzz.files import Entry, damaged_entries, entries, file_bytes
from tests.fuzz.guard import attempt, harness
from tests.fuzz.strategies import damaged_bytes, damaged_tree, encoded, json_files

VALID = {kind: entries(adapters.tensors(kind)) for kind in adapters.KINDS}
kinds = st.sampled_from(sorted(VALID))


@cache
def base() -> Path:
    """Made once for all examples, and transformers imported, which takes longer than an example may."""
    folder = adapters.base(Path(tempfile.mkdtemp(prefix="fuzz-base-")) / "base")
    loaded_weights(open_checkpoint(folder), adapters.BASE)
    return folder


def check(config: bytes, tensors: bytes, base_folder: Path | None = None) -> MergePlan | LoraExportError:
    """Planned and applied to a base, or refused; `inspect` says the same."""
    base_folder = base_folder or base()
    with tempfile.TemporaryDirectory(dir=base_folder.parent) as name:
        folder = Path(name)
        (folder / "adapter_config.json").write_bytes(config)
        (folder / "adapter_model.safetensors").write_bytes(tensors)
        around = base_folder.parent
        planned = attempt(around, lambda: plan(base_folder, [AdapterChoice(folder)], MergeOptions()))
        described = attempt(around, lambda: inspect_folder(folder, base_folder))
        if isinstance(described, dict):
            json.dumps(described, ensure_ascii=False).encode()
            assert described.get("fits_base", False) == isinstance(planned, MergePlan), described.get("why_not")
        if isinstance(planned, MergePlan):
            _check_plan(around, planned)
    return planned


def _check_plan(around: Path, planned: MergePlan) -> None:
    """Every tensor of the adapter belongs to one update, and every update makes a sound weight or is refused."""
    (adapter,) = planned.adapters
    keys = [key for update in adapter.updates for key in update.keys]
    assert sorted(keys) == sorted(adapter.tensors)
    assert len(planned.tensors) < 1000
    for tensor in planned.tensors.values():
        for update in tensor.updates:
            made = attempt(around, partial(update.load, tensor.shape))
            if isinstance(made, LoraExportError):
                continue
            weight = torch.ones(tensor.shape)
            rows = slice(0, tensor.shape[0] if tensor.shape else 1)
            changed = attempt(around, partial(made.apply, weight, rows))  # a saved tensor is read here
            assert isinstance(changed, LoraExportError) or (
                changed.shape == tensor.shape and changed.dtype == torch.float32
            )


@pytest.mark.parametrize("kind", adapters.KINDS)
def test_undamaged_adapter_is_planned(kind: str) -> None:
    planned = check(adapters.config_bytes(kind), file_bytes(VALID[kind]))
    assert isinstance(planned, MergePlan), planned


@st.composite
def configurations(draw: st.DrawFn) -> tuple[str, bytes]:
    kind = draw(kinds)
    return kind, draw(json_files(adapters.KINDS[kind][0], adapters.KEYS))


@harness(200, made=configurations())
def test_adapter_config(made: tuple[str, bytes]) -> None:
    kind, config = made
    check(config, file_bytes(VALID[kind]))


@st.composite
def adapter_tensors(draw: st.DrawFn) -> tuple[str, list[Entry] | bytes]:
    kind = draw(kinds)
    if draw(st.integers(0, 9)) == 0:
        return kind, draw(damaged_bytes(file_bytes(VALID[kind])))
    return kind, draw(damaged_entries(VALID[kind], adapters.WORDS))


@harness(250, made=adapter_tensors())
def test_adapter_tensors(made: tuple[str, list[Entry] | bytes]) -> None:
    kind, found = made
    check(adapters.config_bytes(kind), found if isinstance(found, bytes) else file_bytes(found))


BASE_KEYS = (
    *adapters.CONFIG,
    "model_type",
    "tie_word_embeddings",
    "num_layers",
    "n_layer",
    "text_config",
    "layer_types",
)
BASE_CONFIG = {"model_type": "llama", "tie_word_embeddings": False, **adapters.CONFIG}


@harness(60, kind=kinds, config=damaged_tree(BASE_CONFIG, BASE_KEYS).map(encoded), stray=st.booleans())
def test_base_config(kind: str, config: bytes, stray: bool) -> None:
    """config.json of the base; stray: a tensor more, which sends the search for its weight to transformers."""
    tensors = adapters.tensors(kind)
    if stray:
        tensors = {k.replace("mlp", "other"): v for k, v in tensors.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "base")
        folder.mkdir()
        (folder / "config.json").write_bytes(config)
        (folder / "model.safetensors").write_bytes((base() / "model.safetensors").read_bytes())
        described = attempt(folder, lambda: inspect_folder(folder))
        if isinstance(described, dict):
            json.dumps(described, ensure_ascii=False).encode()
        check(adapters.config_bytes(kind), file_bytes(entries(tensors)), folder)
