"""Models that are read layer by layer give the same checks as models in memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_export.contracts import AdapterChoice, MergeOptions, Source, ValidationResult
from lora_export.errors import AdapterError
from lora_export.merging import merge
from lora_export.progress import Silent
from lora_export.validation import ValidationOptions, streams
from lora_export.validation.reference import streaming
from lora_export.workflows.validating import validate_folder
from tests.daily import daily
from tests.matrix.families import FAMILIES
from tests.matrix.test_matrix import train
from tests.validation.conftest import judged
from tests.validation.models import MODELS
from tests.validation.test_kinds import spoil

Folders = tuple[Path, Path, Path]
# Adapters that use the base's weights otherwise than by running its layer.
ADAPTERS = {
    "dora": "llama", "lora tokens": "llama tied", "lora head saved": "bert", "lora experts": "mixtral",
    "lora embedding": "llama tied", "lora bias all": "bert", "boft": "llama", "ia3": "bert",
    "lora norm saved": "vit", "lora convolution": "resnet", "oft": "llama", "vera": "roberta", "loha": "t5",
    "lora replication": "llama", "adalora pruned": "llama", "lokr": "llama",
}  # fmt: skip


def check(folders: Folders, max_memory: int | None, **merge_options: Any) -> ValidationResult:
    base, adapter, merged = folders
    return judged(
        base, adapter, merged, max_memory=max_memory, merge=MergeOptions(**merge_options), rows=16, seed=0
    )


def same(streamed: ValidationResult, resident: ValidationResult) -> None:
    """All but the checks of the model as it will be loaded, which takes it into memory."""
    kept = [c for c in resident.checks if not c.name.startswith("loaded_")]
    assert [c.name for c in streamed.checks] == [c.name for c in kept]
    for a, b in zip(streamed.checks, kept, strict=True):
        # One unit in the last place of fp32 outputs: where tensors lie in memory decides the order of sums.
        assert a.value == pytest.approx(b.value, rel=1e-6, abs=1e-6), (a, b)
        assert a.threshold == (None if b.threshold is None else pytest.approx(b.threshold, rel=1e-6, abs=1e-6))
        assert a.passed == b.passed
    assert streamed.weight_errors == resident.weight_errors


@pytest.mark.parametrize("name", daily(MODELS, ("whisper", "bert tokens", "clip", "vit", "resnet")))
def test_validate_streamed_equals_resident(name: str, tmp_path: Path) -> None:
    base = MODELS[name].save(tmp_path / "base", torch.bfloat16)
    adapter, merged = MODELS[name].train(base, tmp_path / "adapter"), tmp_path / "merged"
    merge(base, [AdapterChoice(adapter)], merged)
    assert streams(merged, 1)
    resident = check((base, adapter, merged), 10**12)
    assert resident.passed
    same(check((base, adapter, merged), 1), resident)
    spoil(merged, MODELS[name].victim, 1.05)
    streamed = check((base, adapter, merged), 1)
    assert len(streamed.weight_errors) == 1
    same(streamed, check((base, adapter, merged), 10**12))


@pytest.mark.parametrize("kind", daily(ADAPTERS, ("dora", "lora tokens", "ia3", "lora convolution", "vera", "oft")))
def test_streaming_adapters_that_read_base_work(kind: str, tmp_path: Path) -> None:
    family = FAMILIES[ADAPTERS[kind]]
    base = family.save(tmp_path / "base")
    train(base, family, kind, tmp_path / "adapter")
    folders = base, tmp_path / "adapter", tmp_path / "merged"
    merge(base, [AdapterChoice(tmp_path / "adapter")], tmp_path / "merged")
    resident = check(folders, 10**12)
    assert resident.passed, [c for c in resident.checks if not c.passed]
    same(check(folders, 1), resident)


def test_streaming_body_without_pooler_works(tmp_path: Path) -> None:
    base = MODELS["bert tokens"].save(tmp_path / "base", torch.float32)
    adapter, merged = MODELS["bert"].train(base, tmp_path / "adapter"), tmp_path / "merged"
    merge(base, [AdapterChoice(adapter)], merged)
    resident = check((base, adapter, merged), None)
    assert resident.passed
    same(check((base, adapter, merged), 1), resident)


def test_streaming_keeps_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = MODELS["bert"].save(tmp_path / "base", torch.float32)
    adapter, merged = MODELS["bert"].train(base, tmp_path / "adapter"), tmp_path / "merged"
    merge(base, [AdapterChoice(adapter)], merged)
    reads = []
    read = streaming.Slot.read

    def counted(slot: streaming.Slot) -> torch.Tensor:
        reads.append(slot.name)
        return read(slot)

    monkeypatch.setattr(streaming.Slot, "read", counted)
    size = 4 * sum(p.numel() for p in MODELS["bert"].model.from_pretrained(merged).parameters())
    results = []
    for limit in (1, 2 * size):
        reads.clear()
        results.append((check((base, adapter, merged), limit), len(reads)))
    same(results[1][0], results[0][0])
    assert results[1][1] < results[0][1] / 3


def test_streaming_missing_weight_is_refused() -> None:
    """What would slip past the hooks must show."""
    model = torch.nn.Linear(3, 2)
    model.weight.data = streaming._nothing(model.weight.shape)
    assert model.weight.shape == (2, 3)
    assert model(torch.ones(1, 3)).isnan().all()


def test_streaming_pissa_is_refused(tmp_path: Path) -> None:
    base = MODELS["bert"].save(tmp_path / "base", torch.float32)
    adapter = MODELS["bert"].train(base, tmp_path / "adapter", init_lora_weights="pissa")
    merge(base, [AdapterChoice(adapter)], tmp_path / "merged")
    with pytest.raises(AdapterError, match="pissa"):
        check((base, adapter, tmp_path / "merged"), 1)


def test_streaming_quantized_base_uses_dequantized_copy(tmp_path: Path) -> None:
    base = FAMILIES["llama"].save(tmp_path / "base")
    train(base, FAMILIES["llama"], "lora", tmp_path / "adapter")
    merging = MergeOptions(training_quantization="nf4")
    merge(base, [AdapterChoice(tmp_path / "adapter")], tmp_path / "merged", merging)
    sources = Source("base", base), [AdapterChoice(tmp_path / "adapter")]
    options = ValidationOptions(merge=merging, seed=0)
    results = [
        validate_folder(*sources, tmp_path / "merged", (), (), replace(options, max_memory=limit), Silent())
        for limit in (10**12, 1)
    ]
    assert results[0].passed
    same(results[1], results[0])
