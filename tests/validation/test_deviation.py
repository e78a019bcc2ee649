"""Faults in merged weights are seen, module and tensor at fault are named; honest weights raise no alarm."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoraConfig, OFTConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file

from lora_export.commands.words import validation_words
from lora_export.contracts import AdapterChoice, Check, Deviation, MergeOptions, Story, ValidationResult
from lora_export.errors import GateFailed
from lora_export.merging import merge
from lora_export.pipeline import failures, refuse_failed
from lora_export.report.story import headline
from lora_export.validation.comparing.tensors import compare_tensors
from lora_export.validation.comparing.texts import PROMPTS
from lora_export.validation.reference import loading
from tests.builders import edit_json
from tests.failures.commands import invoke
from tests.report.conftest import full_report, read
from tests.validation.faults import FAULTS, Bench, Fault, unmerged_model

Folders = Callable[[str], tuple[Path, Path]]
Merged = Callable[[str], Path]
PROMPTS = (PROMPTS[0], PROMPTS[4])
LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def bench(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bench]:
    """dtype name → an honest merge, loaded and measured once."""
    root = tmp_path_factory.mktemp("benches")
    made: dict[str, Bench] = {}

    def get(dtype: str) -> Bench:
        if dtype not in made:
            base, adapter = folders(dtype)
            merge(base, [AdapterChoice(adapter)], root / dtype, MergeOptions())
            made[dtype] = Bench.load(unmerged_model(base, adapter), root / dtype, PROMPTS)
        return made[dtype]

    return get


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_validate_fault_is_caught_and_named(bench: Callable[[str], Bench], fault: Fault, seed: int) -> None:
    """In bf16, where rounding hides most. tools/sensitivity.py tries the same list on a real model."""
    touched, found = bench("bfloat16").try_fault(fault, 100 * FAULTS.index(fault) + seed)
    assert found.failed
    assert found.suspect() in touched
    assert set(found.weight_errors) <= set(touched)
    assert found.located is not None
    assert found.located.module in {name.rpartition(".")[0] for name in touched}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_deviation_of_honest_weights_is_none(bench: Callable[[str], Bench], dtype: str) -> None:
    """Asked for although nothing failed, it finds nothing, in no module and in none around them."""
    honest = bench(dtype)
    assert not honest.judge().failed
    assert honest.locate(()) is None


def test_deviation_value_is_of_module_alone(bench: Callable[[str], Bench]) -> None:
    """Faults upstream do not enter: the module gets the unmerged model's inputs."""
    honest = bench("float32")
    weight = f"{LAYER}.weight"
    merged = dict(honest.merged.named_parameters())
    error = torch.randn(merged[weight].shape, generator=torch.Generator().manual_seed(0)) * 0.1
    inputs: list[torch.Tensor] = []
    module = honest.unmerged.base_model.model.get_submodule(LAYER)
    handle = module.register_forward_hook(lambda _, args, output: inputs.append(args[0]))
    with honest.spoiled({weight: merged[weight] + error}):
        found = honest.locate((weight,))
    handle.remove()
    assert found is not None and found.module == LAYER and found.tensors == (weight,)
    expected = (inputs[0].double() @ error.double().T).abs().max()
    assert found.value == pytest.approx(float(expected), rel=1e-4)
    assert 0 < found.floor < found.value / 4


def test_deviation_names_first_module_of_forward(bench: Callable[[str], Bench]) -> None:
    honest = bench("float32")
    merged = dict(honest.merged.named_parameters())
    early, late = "model.layers.0.mlp.gate_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    with honest.spoiled({late: merged[late] * 3, early: merged[early] * 1.1}):
        found = honest.locate((late, early))  # worst first
    assert found is not None and found.module == early.removesuffix(".weight") and found.tensors == (early,)


def test_deviation_without_output_change_names_tensor(bench: Callable[[str], Bench]) -> None:
    honest = bench("bfloat16")
    name = "model.layers.0.self_attn.o_proj.weight"
    changed = dict(honest.merged.named_parameters())[name].clone()
    changed[0, 0] *= 1.01
    with honest.spoiled({name: changed}):
        found = honest.locate((name,))
        blind = honest.locate(())
    assert blind is None
    assert found is not None and found.tensors == (name,) and found.value <= 4 * found.floor


def test_deviation_finds_changed_setting(folders: Folders, merged: Merged, tmp_path: Path) -> None:
    folder = merged("float32")
    edit_json(folder / "config.json", rope_parameters={"rope_theta": 50.0, "rope_type": "default"})
    (tmp_path / "p.txt").write_text(PROMPTS[1], encoding="utf-8")
    base, adapter = folders("float32")
    words = ("--prompts", tmp_path / "p.txt", "--json", "-q")
    done = invoke("validate", "-b", base, "-a", adapter, "-m", folder, *words)
    assert done.exit_code == 3
    said = json.loads(done.stdout)
    assert said["weight_errors"] == []
    assert said["deviation"]["module"] == "model.rotary_emb" and said["deviation"]["tensors"] == []
    assert "the first module that differs is model.rotary_emb" in done.stderr


def test_validate_command_names_tensor(folders: Folders, merged: Merged, tmp_path: Path) -> None:
    folder = merged("bfloat16")
    state = load_file(folder / "model.safetensors")
    state[f"{LAYER}.weight"] *= 1.5
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "p.txt").write_text(PROMPTS[1], encoding="utf-8")
    base, adapter = folders("bfloat16")
    done = invoke("validate", "-b", base, "-a", adapter, "-m", folder, "--prompts", tmp_path / "p.txt")
    assert done.exit_code == 3
    assert f"the first module that differs: {LAYER}, by" in done.stdout
    assert f"because of {LAYER}.weight" in done.stdout
    assert LAYER in done.stderr


# --- no element goes unseen --------------------------------------------------------------------------------


def kinds() -> dict[str, PeftConfig]:
    targets = ["q_proj", "down_proj"]
    return {
        "lora": LoraConfig(r=2, lora_alpha=3, target_modules=targets, task_type="CAUSAL_LM"),
        "dora": LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=targets, task_type="CAUSAL_LM"),
        "loha": LoHaConfig(r=2, alpha=3, target_modules=targets, task_type="CAUSAL_LM"),
        "oft": OFTConfig(r=0, oft_block_size=8, target_modules=targets, task_type="CAUSAL_LM"),
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", kinds())
def test_compare_tensors_sees_unsampled_column(folders: Folders, tmp_path: Path, kind: str, dtype: str) -> None:
    """Two sampled columns are the first and the last; the fault is in another, of whatever kind the adapter is."""
    base, _ = folders(dtype)
    tuned = get_peft_model(loading.load_base(base, MergeOptions()), kinds()[kind])
    generator = torch.Generator().manual_seed(5)
    for name, parameter in tuned.named_parameters():
        if any(x in name for x in ("lora_B", "hada_", "oft_R")):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    tuned.save_pretrained(tmp_path / "adapter")
    merge(base, [AdapterChoice(tmp_path / "adapter")], tmp_path / "merged", MergeOptions())
    unmerged = unmerged_model(base, tmp_path / "adapter")
    model, dtypes = loading.load_merged(tmp_path / "merged")

    def worst() -> dict[str, float]:
        return {e.name: e.worst for e in compare_tensors(unmerged, model, dtypes, rows=2)}

    assert max(worst().values()) <= 1
    weight = model.get_submodule(LAYER).weight
    weight.data[:, 7] = 0
    found = worst()
    assert found[f"{LAYER}.weight"] > 1
    assert sum(w > 1 for w in found.values()) == 1
    assert found == worst()  # and is judged alike each time


def test_deviation_compares_named_modules(bench: Callable[[str], Bench]) -> None:
    honest = bench("float32")
    found = compare_tensors(honest.unmerged, honest.merged, honest.dtypes, 4, only={LAYER, "model.norm"})
    assert {e.name for e in found} == {f"{LAYER}.weight", "model.norm.weight"}


# --- how it is told ----------------------------------------------------------------------------------------


def spoiled_result(deviation: Deviation | None) -> ValidationResult:
    checks = (Check("logits_max_abs", 3.0, 0.1, False), Check("top1_agreement", 1.0, 0.9, True))
    return ValidationResult(checks, weight_errors=("b.weight", "a.weight"), deviation=deviation)


DEVIATION = Deviation("model.layers.1.a", 0.5, 0.01, ("model.layers.1.a.weight",))


def test_gate_error_names_first_module_tensor(tmp_path: Path) -> None:
    def gate(deviation: Deviation | None) -> GateFailed:
        with pytest.raises(GateFailed) as caught:
            refuse_failed(Story(tmp_path, merge=None, validate=spoiled_result(deviation)))  # type: ignore[arg-type]
        return caught.value

    assert gate(DEVIATION).tensor == "model.layers.1.a.weight"
    assert "the first module that differs is model.layers.1.a" in gate(DEVIATION).found
    assert gate(None).tensor == "b.weight"
    assert failures(spoiled_result(None)) == "logits_max_abs is 3, allowed 0.1"


def test_deviation_is_in_output_and_report(tmp_path: Path) -> None:
    result = spoiled_result(DEVIATION)
    said = validation_words(result)
    assert "the first module that differs: model.layers.1.a, by 0.5 (noise floor 0.01), because of" in said
    report = replace(read(full_report()), validate=result, status="failed")
    sentences = " ".join(headline(report))
    assert "The first module that differs is model.layers.1.a: its output is off by 0.5" in sentences
    assert "Look at model.layers.1.a.weight" in sentences
    assert "first module" not in " ".join(headline(replace(report, validate=spoiled_result(None))))
