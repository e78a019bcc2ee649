"""A budget in place of knobs: what a run searches for, and a whole search on a tiny model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from lora_export.choices import Precision
from lora_export.commands.main import cli
from lora_export.contracts import (
    AdapterChoice,
    BenchmarkOptions,
    ExportOptions,
    QuantizationOptions,
    Source,
    StoryOptions,
    ValidationOptions,
)
from lora_export.errors import ExportError, InputError
from lora_export.onnx_export import export
from lora_export.onnx_export.records import read_record
from lora_export.onnx_export.weights import map as weights_map
from lora_export.pipeline import merge_and_export
from lora_export.progress import Silent
from lora_export.report.files import load
from lora_export.workflows.budget import searches, with_budget
from tests.validation.conftest import save_adapter, save_base


def story(precision: Precision = "int4", survival: float | None = None, size: int | None = None) -> StoryOptions:
    export = ExportOptions(precision, "cpu")
    return StoryOptions(export=export, validation=ValidationOptions(min_survival=survival, seed=1), max_size=size)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (story(), False),
        (story(survival=0.0), False),
        (story(survival=0.9), True),
        (story("int8", survival=0.9), True),
        (story("fp16", survival=0.9), False),
        (story(size=10**8), True),
        (story(survival=0.0, size=10**8), True),
    ],
)
def test_searches_needs_a_wish_and_bits_to_choose(options: StoryOptions, wanted: bool) -> None:
    assert searches(options, Path()) is wanted


def test_min_survival_not_given_is_the_gate_s_own() -> None:
    assert ValidationOptions().least_survival == 0.9 and ValidationOptions(min_survival=0.0).least_survival == 0.0


def test_with_budget_search_takes_gptq_unless_named() -> None:
    assert with_budget(story(survival=0.9), Path()).export.quantization.algorithm == "gptq"
    assert with_budget(story(), Path()) == story()
    given = story(survival=0.9)
    given = replace(given, export=replace(given.export, quantization=QuantizationOptions(algorithm="rtn")))
    assert with_budget(given, Path()) == given


@pytest.mark.parametrize(
    ("export", "found"),
    [
        (ExportOptions("fp32"), "--max-size with --precision fp32"),
        (ExportOptions("nf4"), "--max-size with --precision nf4"),
        (ExportOptions("int8", quantization=QuantizationOptions(activations="dynamic")), "--activations dynamic"),
        (ExportOptions("int4", graph_from=Path("earlier")), "--max-size with --graph-from"),
    ],
)
def test_max_size_where_nothing_can_be_chosen_refused(export: ExportOptions, found: str) -> None:
    with pytest.raises(InputError, match=found) as caught:
        with_budget(replace(story(size=10**8), export=export), Path())
    assert caught.value.next_step is not None


def test_searches_model_of_sounds_does_not(tmp_path: Path) -> None:
    """Damage is measured on texts; the gate stays what it was."""
    (tmp_path / "config.json").write_text('{"model_type": "whisper", "num_mel_bins": 80}')
    assert not searches(story(survival=0.9), tmp_path)
    assert with_budget(story(survival=0.9), tmp_path) == story(survival=0.9)
    with pytest.raises(InputError, match=r"num_mel_bins in config\.json"):
        with_budget(story(size=10**8), tmp_path)


def test_max_size_fp32_command_refused_before_any_work(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", torch.float32)
    adapter = save_adapter(base, tmp_path / "adapter")
    words = ["-b", base, "-a", adapter, "-o", tmp_path / "run", "--max-size", "1MB"]
    done = CliRunner().invoke(cli, ["merge-and-export", *map(str, words), "--json"])
    assert done.exit_code == 1 and "--max-size with --precision fp32" in done.stderr
    assert not (tmp_path / "run").exists()


# --- whole searches ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, list[AdapterChoice]]:
    root = tmp_path_factory.mktemp("budget")
    base = save_base(root / "base", torch.float32)
    return Source("base", base), [AdapterChoice(save_adapter(base, root / "adapter"))]


def run(inputs: tuple[Source, list[AdapterChoice]], out: Path, options: StoryOptions) -> StoryOptions:
    """Of a tiny model that rounding to nearest spoils enough."""
    quantization = QuantizationOptions(algorithm="rtn", block_size=64)
    export = replace(options.export, quantization=quantization)
    quick = BenchmarkOptions(shapes=((1, 8),), max_seconds=1, margin=0.9)
    chosen = replace(options, export=export, benchmark=quick)
    merge_and_export(inputs[0], inputs[1], out, chosen, Silent())
    return chosen


@pytest.mark.slow
def test_budget_min_survival_finds_a_mixed_export_that_keeps_it(
    inputs: tuple[Source, list[AdapterChoice]], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run(inputs, out, replace(story(survival=0.0), merged_folder=False))
    (before,) = load(out / "report").validate.adapter_survival  # type: ignore[union-attr]
    assert before.share is not None and before.share < 0.99
    wanted = (1 + before.share) / 2
    out = tmp_path / "searched"
    run(inputs, out, replace(story(survival=wanted), merged_folder=False))
    report = load(out / "report")
    assert report.budget is not None and report.validate is not None and report.validate.passed
    (taken,) = (s for s in report.budget.steps if s.chosen)
    assert taken.share is not None and taken.share >= wanted and taken.in_int8 + taken.unquantized
    assert all(s.share is not None and s.share < wanted for s in report.budget.steps if s.nbytes < taken.nbytes)
    (judged,) = (c for c in report.validate.checks if c.name == "onnx_adapter_survival")
    assert judged.value == pytest.approx(taken.share, abs=1e-6), "the search measures what the gate judges"
    record = read_record(out / "onnx")
    assert record.quantization is not None and record.proof is not None
    assert len({*record.quantization.eight_bits, *record.quantization.keep}) >= taken.in_int8 + taken.unquantized
    assert "<svg" in (out / "report" / "report.html").read_text().split('id="budget"')[1]
    words = ["verify", out, "-b", inputs[0].folder, "-a", inputs[1][0].folder, "--json"]
    done = CliRunner().invoke(cli, [*map(str, words)])
    assert done.exit_code == 0, done.stdout
    assert not (out / ".work").exists()


@pytest.mark.slow
def test_budget_max_size_takes_what_fits(inputs: tuple[Source, list[AdapterChoice]], tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(inputs, out, replace(story(survival=0.0), merged_folder=False))
    smallest = sum((out / "onnx" / n).stat().st_size for n in ("model.onnx", "model.onnx.data"))
    with pytest.raises(ExportError, match="the smallest export has"):
        run(inputs, tmp_path / "none", story(survival=0.0, size=smallest - 1))
    assert not (tmp_path / "none").exists()
    most = smallest + 9000
    run(inputs, tmp_path / "sized", story(survival=0.0, size=most))
    budget = load(tmp_path / "sized" / "report").budget
    assert budget is not None
    (taken,) = (s for s in budget.steps if s.chosen)
    assert smallest < taken.nbytes <= most
    assert taken.share == max(s.share for s in budget.steps if s.nbytes <= most and s.share is not None)


@pytest.mark.slow
def test_budget_export_equals_a_fresh_one_of_the_same_bits(
    inputs: tuple[Source, list[AdapterChoice]], tmp_path: Path
) -> None:
    """What was copied from other exports is what quantizing anew gives."""
    run(inputs, tmp_path / "run", story("int8", survival=0.0, size=10**6))
    found = tmp_path / "run" / "onnx"
    how = read_record(found).quantization
    assert how is not None and how.keep
    same = QuantizationOptions(algorithm="rtn", block_size=64, symmetric=how.symmetric, keep=how.keep)
    fresh = export(
        tmp_path / "run" / "merged",
        tmp_path / "fresh",
        ExportOptions("int8", "cpu", quantization=same),
        progress=Silent(),
    )
    assert weights_map.read(fresh.output) == weights_map.read(found)
    for name in ("model.onnx", "model.onnx.data", "quantization.json"):
        assert (fresh.output / name).read_bytes() == (found / name).read_bytes()
