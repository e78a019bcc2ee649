"""Validation of PEFT's rarer kinds: an honest merge passes every check, and their layers answer what is asked."""

from pathlib import Path

import peft
import pytest
import torch
import transformers

from lora_export.contracts import AdapterChoice
from lora_export.errors import AdapterError
from lora_export.merging import merge
from lora_export.progress import Silent
from lora_export.validation import validate
from lora_export.validation.reference.mended import mend, weigh
from lora_export.validation.reference.probes import base_layer, wrapped_modules
from lora_export.validation.reference.streaming import refuse_changing_inits
from tests.builders import llama_config, randomize
from tests.matrix.families import FAMILIES
from tests.matrix.kinds import KINDS, SELDOM
from tests.matrix.test_matrix import train

LLAMA = FAMILIES["llama"]
# Whose change a factor scales.
ADDING = [
    k for k in KINDS
    if k in SELDOM and k.split()[0] in ("adamss", "beft", "pvera", "supertuning", "tinylora", "unilora")
    and "bias" not in k
]  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return LLAMA.save(tmp_path_factory.mktemp("llama") / "base")


def failed(base: Path, adapter: AdapterChoice, merged: Path) -> list[str]:
    merge(base, [adapter], merged)
    result = validate(base, [adapter], merged, progress=Silent())
    assert any(c.name == "tensor_errors" for c in result.checks)
    return [c.name for c in result.checks if not c.passed]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [k for k in sorted(SELDOM) if KINDS[k](LLAMA) is not None])
def test_validate_rarer_kind_passes(kind: str, llama: Path, tmp_path: Path) -> None:
    train(llama, LLAMA, kind, tmp_path / "adapter")
    assert failed(llama, AdapterChoice(tmp_path / "adapter"), tmp_path / "merged") == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ADDING)
def test_validate_rarer_kind_with_factor_passes(kind: str, llama: Path, tmp_path: Path) -> None:
    train(llama, LLAMA, kind, tmp_path / "adapter")
    assert failed(llama, AdapterChoice(tmp_path / "adapter", 0.5), tmp_path / "merged") == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [peft.PsoftConfig(r=32), peft.OSFConfig(effective_rank=0.5)], ids=["psoft", "osf"]
)
def test_decomposition_does_not_depend_on_threads(config: peft.PeftConfig, tmp_path: Path) -> None:
    """Of matrices so large that the library shares out the work."""
    base = transformers.LlamaForCausalLM(
        llama_config(False, hidden_size=512, intermediate_size=640, num_hidden_layers=1)
    )
    randomize(base, 1)
    base.save_pretrained(tmp_path / "base")
    config.target_modules = {"q_proj", "up_proj"}
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.01)
    model.save_pretrained(tmp_path / "adapter")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert failed(tmp_path / "base", AdapterChoice(tmp_path / "adapter"), tmp_path / "merged") == []
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ADDING)
def test_reference_factor_scales_layer(kind: str) -> None:
    model = peft.get_peft_model(LLAMA.model(LLAMA.config()), KINDS[kind](LLAMA))
    randomize(model, 2, tuple(n for n, p in model.named_parameters() if p.requires_grad), 0.2)
    mend(model.double().eval())
    layer = next(iter(wrapped_modules(model.base_model.model).values()))
    plain = base_layer(layer)
    embeds = isinstance(plain, torch.nn.Embedding)
    x = torch.arange(5) if embeds else torch.randn(3, plain.weight.shape[1], dtype=torch.float64)
    with torch.no_grad():
        added = layer(x) - plain(x)
        weigh(layer, {"default": 0.25})
        torch.testing.assert_close(layer(x) - plain(x), added / 4)
    assert float(added.abs().max()) > 1e-4


def test_noise_reaches_outputs_of_frod() -> None:
    model = peft.get_peft_model(LLAMA.model(LLAMA.config()), KINDS["frod"](LLAMA)).double().eval()
    mend(model)
    layer = next(iter(wrapped_modules(model.base_model.model).values()))
    weight, x = base_layer(layer).weight, torch.eye(base_layer(layer).weight.shape[1], dtype=torch.float64)
    error = torch.randn(weight.shape, dtype=torch.float64) * 1e-3
    with torch.no_grad():
        before = layer(x)
        weight.add_(error)
        torch.testing.assert_close(layer(x) - before, error.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["frod", "osf", "psoft", "tinylora"])
def test_streaming_of_decomposing_kinds_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="decomposes the base's weights"):
        refuse_changing_inits([KINDS[kind](LLAMA)], tmp_path)
    refuse_changing_inits([KINDS["hira"](LLAMA)], tmp_path)
