"""An adapter on its two bases and back in few bits, against figures computed here in float64."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes import functional as bnb
from click.testing import CliRunner
from peft import PeftModel

from lora_export.commands.main import cli
from lora_export.contracts import (
    AdapterChoice,
    AdapterSurvival,
    BaseComparison,
    CompareBases,
    MergeOptions,
    ValidationResult,
)
from lora_export.errors import InputError
from lora_export.merging import merge
from lora_export.progress import Silent
from lora_export.validation import ValidationOptions, validate
from lora_export.validation.effect.advice import bases_advice
from lora_export.validation.reference.quantized import requantize
from tests.builders import bert_config, lora, save_adapter
from tests.builders import save_base as save_random
from tests.validation.conftest import save_base, save_tokenizer

Folders = Callable[[str], tuple[Path, Path]]
NF4 = MergeOptions(training_quantization="nf4")
TEXT = ("It is with great satisfaction that I", "The state of the Union is good. " * 3, "def f(x): return x\n")


@pytest.fixture(autouse=True)
def without_compiling() -> Iterator[None]:
    """bitsandbytes compiles its CPU code for each shape, which takes seconds and changes no bit."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(t.strip() for t in TEXT), encoding="utf-8")
    return file


def compared(
    base: Path, adapter: Path, merged: Path, prompts: Path, asked: CompareBases, options: MergeOptions
) -> ValidationResult:
    settings = ValidationOptions(prompts, prompts, provider="cpu", merge=options, bases=asked)
    return validate(base, [AdapterChoice(adapter)], merged, options=settings, progress=Silent())


# --- the figures, computed here ----------------------------------------------------------------------------


def nf4(weight: torch.Tensor) -> torch.Tensor:
    """Quantized and dequantized in float64 by the format's definition: the nearest of 16 values × the block's
    largest magnitude, for blocks of 64 in row-major order."""
    code = bnb.get_4bit_type("nf4", device="cpu").double()
    flat = weight.double().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % 64)).view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / scale.clamp_min(1e-30)).unsqueeze(-1).sub(code).abs().argmin(-1)
    return (code[nearest] * scale).flatten()[: len(flat)].view(weight.shape)


def in_nf4(model: Any) -> Any:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = nf4(module.weight.data)
    return model


def double(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double().eval()


def with_adapter(model: Any, adapter: Path) -> Any:
    return PeftModel.from_pretrained(model, adapter).double().eval()


def outputs(model: Any, folder: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, log-probabilities) of each text in float64."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer("\n".join(t.strip() for t in TEXT), return_tensors="pt")["input_ids"][0]]
    with torch.no_grad():
        return [(ids, torch.log_softmax(model(input_ids=ids[None]).logits[0], -1)) for ids in texts]


def perplexity(found: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    losses = [-p[t, ids[t + 1]] for ids, p in found for t in range(len(ids) - 1)]
    return math.exp(float(sum(losses)) / len(losses))


def kl(reference: list[tuple[torch.Tensor, torch.Tensor]], found: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    sums = [(p.exp() * (p - q)).sum() for (_, p), (_, q) in zip(reference, found, strict=True)]
    return float(sum(sums)) / sum(len(ids) for ids, _ in reference)


def test_bases_figures_match_float64(folders: Folders, tmp_path: Path, prompts: Path) -> None:
    base, adapter = folders("bfloat16")
    merged = tmp_path / "merged"
    merge(base, [AdapterChoice(adapter)], merged, NF4)
    result = compared(base, adapter, merged, prompts, CompareBases("nf4"), NF4)

    trained = outputs(with_adapter(in_nf4(double(base)), adapter), base)
    wanted = {
        "trained": trained,
        "dequantized": outputs(double(merged), base),
        "original": outputs(with_adapter(double(base), adapter), base),
        "requantized": outputs(in_nf4(double(merged)), base),
    }
    assert [b.base for b in result.bases] == list(wanted)
    for found in result.bases:
        assert found.perplexity == pytest.approx(perplexity(wanted[found.base]), rel=1e-4), found.base
        assert found.kl_trained == pytest.approx(kl(trained, wanted[found.base]), rel=1e-3, abs=1e-9), found.base
    untrained = {p.model: p.value for p in result.perplexities}
    assert untrained["base dequantized"] == pytest.approx(perplexity(outputs(in_nf4(double(base)), base)), rel=1e-4)
    assert untrained["base original"] == pytest.approx(perplexity(outputs(double(base), base)), rel=1e-4)
    # The dequantized merge is what was trained, up to rounding to bfloat16; the original is not.
    kls = {b.base: b.kl_trained for b in result.bases}
    assert kls["trained"] < 1e-9
    assert kls["dequantized"] < kls["original"] / 10


def weak(adapter: Path, base: Path, factor: float) -> Path:
    """An adapter whose update is far under half a step of NF4."""
    return save_adapter(adapter, base, lora(target_modules=["q_proj", "v_proj", "down_proj"]), scale=factor)


def test_bases_requantizing_loss_is_reported(folders: Folders, tmp_path: Path, prompts: Path) -> None:
    base, _ = folders("float32")
    adapter = weak(tmp_path / "adapter", base, 0.005)
    merge(base, [AdapterChoice(adapter)], tmp_path / "merged", NF4)
    result = compared(base, adapter, tmp_path / "merged", prompts, CompareBases("nf4"), NF4)
    (left,) = result.adapter_survival
    assert left.model == "requantized nf4"
    assert left.share is not None and left.share < 0.3
    assert left.kl_lost > 0.5 * left.kl_base > 0
    assert any(a.startswith("Do not put it back into NF4") for a in result.advice)
    assert any(a.startswith("Ship the dequantized merge") for a in result.advice)
    assert result.passed, "what requantizing would do is no fault of the merge"


def test_bases_strong_adapter_survives_8_bits(folders: Folders, tmp_path: Path, prompts: Path) -> None:
    base, adapter = folders("float32")
    options = MergeOptions(training_quantization="int8")
    merge(base, [AdapterChoice(adapter)], tmp_path / "merged", options)
    result = compared(base, adapter, tmp_path / "merged", prompts, CompareBases("int8"), options)
    (left,) = result.adapter_survival
    assert left.share == pytest.approx(1, abs=0.05)
    assert not any("Do not put" in a for a in result.advice)


def test_bases_merge_into_original_is_measured(folders: Folders, tmp_path: Path, prompts: Path) -> None:
    base, adapter = folders("float32")
    options = MergeOptions(training_quantization="nf4", base_weights="original")
    merge(base, [AdapterChoice(adapter)], tmp_path / "merged", options)
    result = compared(base, adapter, tmp_path / "merged", prompts, CompareBases(), options)
    kls = {b.base: b.kl_trained for b in result.bases}
    assert kls["original"] > 1e-4 and kls["dequantized"] < 1e-9
    assert "without --base-weights original" in result.advice[0]


# --- bases that are stored in 4 bits -----------------------------------------------------------------------


@pytest.fixture
def stored(folders: Folders, tmp_path: Path) -> tuple[Path, Path, Path]:
    """(4-bit base, its original, adapter)."""
    original, adapter = folders("bfloat16")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        original, dtype="auto", quantization_config=config, device_map={"": "cpu"}
    )
    model.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    return tmp_path / "base", original, adapter


def test_bases_stored_base_with_original_is_compared(
    stored: tuple[Path, Path, Path], tmp_path: Path, prompts: Path
) -> None:
    base, original, adapter = stored
    merge(base, [AdapterChoice(adapter)], tmp_path / "merged")
    asked = CompareBases(original=original)
    result = compared(base, adapter, tmp_path / "merged", prompts, asked, MergeOptions())
    found = {b.base: b for b in result.bases}
    wanted = outputs(with_adapter(double(original), adapter), original)
    assert found["original"].perplexity == pytest.approx(perplexity(wanted), rel=1e-4)
    assert found["dequantized"].kl_trained < found["original"].kl_trained / 10


def test_bases_stored_base_without_original_is_compared(
    stored: tuple[Path, Path, Path], tmp_path: Path, prompts: Path
) -> None:
    base, _, adapter = stored
    merge(base, [AdapterChoice(adapter)], tmp_path / "merged")
    result = compared(base, adapter, tmp_path / "merged", prompts, CompareBases(), MergeOptions())
    assert [b.base for b in result.bases] == ["trained", "dequantized"]
    assert "--original-base" in result.advice[0]


def test_bases_original_of_other_shape_is_refused(
    stored: tuple[Path, Path, Path], tmp_path: Path, prompts: Path
) -> None:
    base, _, adapter = stored
    other = save_random(tmp_path / "other")
    merge(base, [AdapterChoice(adapter)], tmp_path / "merged")
    with pytest.raises(InputError, match="the original base is another model") as caught:
        compared(base, adapter, tmp_path / "merged", prompts, CompareBases(original=other), MergeOptions())
    assert caught.value.tensor == "model.embed_tokens.weight"
    assert caught.value.next_step is not None


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--requantize", "nf4"], "the same command with --compare-bases"),
        (["--original-base", "BASE"], "the same command with --compare-bases"),
        (["--compare-bases"], "--training-quantization nf4"),
        (
            ["--compare-bases", "--training-quantization", "nf4", "--original-base", "BASE"],
            "without --original-base",
        ),
    ],
)
def test_bases_inconsistent_options_are_refused(folders: Folders, words: list[str], said: str) -> None:
    base, adapter = folders("float32")
    named = [str(base) if w == "BASE" else w for w in words]
    done = CliRunner().invoke(cli, ["validate", "-b", str(base), "-a", str(adapter), "-m", str(base), *named])
    assert done.exit_code == 1, done.output
    assert said in " ".join(done.stderr.split())


def test_bases_original_in_4_bits_is_refused(stored: tuple[Path, Path, Path], prompts: Path) -> None:
    base, _, adapter = stored
    with pytest.raises(InputError, match="itself stored quantized"):
        compared(base, adapter, base, prompts, CompareBases(original=base), MergeOptions())


def test_bases_of_encoder_are_refused(tmp_path: Path, prompts: Path) -> None:
    base = save_random(tmp_path / "base", transformers.BertModel, bert_config())
    save_tokenizer(base)
    adapter = save_adapter(tmp_path / "adapter", base, lora(target_modules=["query"]), transformers.BertModel)
    merge(base, [AdapterChoice(adapter)], tmp_path / "merged", NF4)
    with pytest.raises(InputError, match="an encoder does not have"):
        compared(base, adapter, tmp_path / "merged", prompts, CompareBases(), NF4)


# --- parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("method", ["nf4", "fp4", "int8"])
def test_bases_requantizing_twice_changes_little(tmp_path: Path, method: Any, double_quant: bool) -> None:
    """Weights that lie on the grid stay there; rows that do not end with a block of 64 included."""
    base = save_base(tmp_path / "base", torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = {n: p.clone() for n, p in model.named_parameters()}
    requantize(model, method, double_quant, {})
    once = {n: p.clone() for n, p in model.named_parameters()}
    requantize(model, method, double_quant, {})
    for name, parameter in model.named_parameters():
        inside = "_proj" in name
        moved = (once[name] - before[name]).norm() / before[name].norm()
        again = (parameter - once[name]).norm() / before[name].norm()
        assert (0.001 < moved < 0.2) if inside else moved == 0, name
        assert again < (0.05 if double_quant or method == "int8" else 1e-6), name


def test_bases_advice_prefers_better_original() -> None:
    figures = {"trained": 56.68, "dequantized": 56.65, "original": 50.81, "requantized": 73.48}
    bases = {name: BaseComparison(name, value, 0.1) for name, value in figures.items()}
    untrained = {"base dequantized": 74.04}
    kept = AdapterSurvival("requantized nf4", 0.03, 0.2, 0.2)
    ship, back = bases_advice(bases, untrained, kept, "nf4", merged_faithfully=True)
    assert ship.startswith("Ship the dequantized merge") and "10% better" in ship
    assert "not the function that was trained" in ship
    assert back.startswith("Do not put it back into NF4") and "97 % of what the training gained" in back


def test_bases_advice_without_gain() -> None:
    bases = {name: BaseComparison(name, 30.0, 0.0) for name in ("trained", "dequantized")}
    advice = bases_advice(bases, {"base dequantized": 29.0}, None, None, merged_faithfully=True)
    assert any("training gained nothing" in a for a in advice)
