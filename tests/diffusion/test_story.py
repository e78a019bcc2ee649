"""The story of a pipeline: what its report shows, what a run refuses, how its manifest is sealed, and the whole."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from lora_export import manifest
from lora_export.commands.main import cli
from lora_export.contracts import (
    ArmTimes,
    BenchmarkResult,
    Cell,
    Check,
    ComponentMerge,
    GraphComparison,
    MergeResult,
    NamedAdapter,
    NamedSource,
    NamedSources,
    Percentile,
    Picture,
    PictureTime,
    PipelineFacts,
    Report,
    StoryOptions,
    StyleAdapter,
    ValidationResult,
)
from lora_export.contracts.options import ExportOptions, ValidationOptions
from lora_export.contracts.report import SCHEMA_VERSION
from lora_export.errors import GateFailed, InputError
from lora_export.pipeline import merge_and_export
from lora_export.progress import Silent
from lora_export.report import files, pictures
from lora_export.wording import check_label, check_threshold
from lora_export.workflows.pipelines.story import refuse_text_options

SIZE = 16


def picture(name: str, file: str, psnr: float | None = None, gain: float | None = None) -> Picture:
    return Picture(name, file, SIZE, SIZE, psnr, gain)


PICTURES = (
    picture("unmerged", "unmerged.png"),
    picture("base", "base.png", 9.3),
    picture("base − unmerged", "base-minus-unmerged.png", 9.3, 1.0),
    picture("merged", "merged.png", 118.2),
    picture("merged − unmerged", "merged-minus-unmerged.png", 118.2, 65536.0),
    picture("onnx fp32", "onnx-fp32.png", float("inf")),
)
CHECKS = (
    Check("unet_tensor_errors", 0, 0, True),
    Check("unet_t1_max_abs", 2e-6, 1e-5, True),
    Check("unet_t999_max_abs", 6e-6, 1e-5, True),
    Check("onnx_unet_graph_max_abs", 1e-6, 4e-6, True),
    Check("text_encoder_stored_tensors_differ", 0, 0, True),
    Check("image_psnr", 118.2, 104.0, True, "dB"),
)


def full(**changes: Any) -> Report:
    """A report of a run on a pipeline, with every stage but the export."""
    graph = GraphComparison(True, "ab" * 32, "ab" * 32, 405, {})
    p50 = Percentile(8.1, 8.0, 8.2)
    arms = {"merged": ArmTimes(p50, p50, p50, 123.5, None, None, 1.01, 0.99, 1.02)}
    cell = Cell(1, 16, "denoise", False, 8.0, 8.1, None, 1.01, 0.99, 1.02, "inconclusive", arms=arms)
    parts = {"unet": ComponentMerge({"updated": 83, "copied": 125}, 0.987, "float16", {"lora": 60, "locon": 23})}
    facts = PipelineFacts(
        "StableDiffusionPipeline",
        {"text_encoder": "CLIPTextModel", "unet": "UNet2DConditionModel", "vae": "AutoencoderKL"},
        (StyleAdapter("style.safetensors", "kohya", 0.8, {"unet": 83}, {"lora": 60, "locon": 23}, ("<cat>",),
                      {"ss_network_module": "networks.lora"}),),
        skipped=("text_encoder",),
    )  # fmt: skip
    merge = MergeResult(
        Path("merged"), {"updated": 83, "copied": 125}, {"used": 249, "total": 249}, 1.0, 10**8, 0.987,
        Path("merged/lora_export_certificate.json"), "original", "float16", components=parts,
    )  # fmt: skip
    bench = BenchmarkResult(
        "cpu", True, (cell,), 0.01, True, "inconclusive", 3.0, graphs={"unet": graph, "vae_decoder": graph},
        pictures=(PictureTime("base", 0.25, 4, 64), PictureTime("merged", 0.26, 4, 64)),
    )  # fmt: skip
    sources = NamedSources(NamedSource("sd15"), (NamedAdapter("style.safetensors", weight=0.8),))
    report = Report(
        SCHEMA_VERSION, "style.safetensors on sd15", "2026-11-30T08:00:00+00:00", "0", "passed", {}, sources,
        merge, ValidationResult(CHECKS, pictures=PICTURES), None, bench, None, facts,
    )  # fmt: skip
    return replace(report, **changes)


def written(folder: Path, report: Report | None = None, without: str = "") -> tuple[str, str]:
    """(HTML, Markdown) of a report, with a file for each picture but one."""
    (folder / "pictures").mkdir(parents=True)
    for one in PICTURES:
        if one.file != without:
            values = np.random.default_rng(len(one.file)).integers(0, 255, (SIZE, SIZE, 3), np.uint8)
            Image.fromarray(values).save(folder / "pictures" / one.file)
    files.write(report or full(), folder)
    return tuple((folder / name).read_text() for name in ("report.html", "report.md"))  # type: ignore[return-value]


# --- the report ----------------------------------------------------------------------------------------------


def test_report_of_a_pipeline_holds_its_pictures(tmp_path: Path) -> None:
    html, markdown = written(tmp_path / "report")
    assert html.count('<img src="data:image/png;base64,') == len(PICTURES)
    order = [html.index(f"<figcaption><b>{name}</b>") for name in ("base", "unmerged", "merged", "onnx fp32")]
    assert order == sorted(order)
    assert "the differences × 65,536" in html and "the same, bit for bit" in html and "9.3 dB from it" in html
    for one in PICTURES:
        assert f"](pictures/{one.file})" in markdown
    assert "merged: 118 dB" in html and "merged: 118 dB" in markdown


def test_report_of_a_pipeline_tells_models_adapter_graphs_and_times(tmp_path: Path) -> None:
    html, markdown = written(tmp_path / "report")
    rows = re.findall(r"<tr>(.*?)</tr>", html)
    text = [re.sub(r"\s*<[^>]+>\s*", "|", row) for row in rows]
    assert "|unet||UNet2DConditionModel||83||125||lora 60, locon 23||98.70%||float16|" in text
    assert any("text_encoder" in row and "left as it is, as asked" in row for row in text)
    assert any("AutoencoderKL" in row and "byte for byte" in row for row in text)
    assert any("style.safetensors" in row and "kohya, 1 new words" in row and "0.8" in row for row in text)
    assert any(row.startswith("|vae_decoder||the base&#39;s own||405|") for row in text)
    assert "|merged||0.26||4||64 × 64|" in text and "networks.lora" in html
    assert "| merged | 0.26 | 4 | 64 × 64 |" in markdown
    for page in (html, markdown):
        assert "Latents per second" in page and "Tokens per second" not in page
        assert "denoiser step · batch 1 · latent 16 × 16" in page and "sides of the latent" in page


def test_report_of_a_pipeline_sums_up_checks_by_model(tmp_path: Path) -> None:
    html, _ = written(tmp_path / "report")
    text = [re.sub(r"\s*<[^>]+>\s*", "|", row) for row in re.findall(r"<tr>(.*?)</tr>", html)]
    assert "|unet||0||6e-6, 60% of the limit||1e-6, 25% of the limit||–|" in text
    assert "Errors of the denoiser by timestep" in html and "<details><summary>All 6 checks" in html
    bad = replace(CHECKS[2], value=float("nan"), passed=False)
    html, _ = written(tmp_path / "failed", full(validate=ValidationResult((*CHECKS, bad), pictures=PICTURES)))
    assert "nan, inf% of the limit" in html and "<details open><summary>All 7 checks" in html


def test_report_without_a_picture_says_so_and_reads_no_other_file(tmp_path: Path) -> None:
    html, _ = written(tmp_path / "report", without="merged.png")
    assert html.count("<img") == len(PICTURES) - 1 and "not there: merged.png" in html
    (tmp_path / "secret.png").write_bytes((tmp_path / "report" / "pictures" / "base.png").read_bytes())
    (tmp_path / "report" / "pictures" / "text.png").write_bytes(b"no picture")
    (tmp_path / "report" / "pictures" / "link.png").symlink_to(tmp_path / "secret.png")
    for name in ("../../secret.png", "text.png", "link.png", "secret.png?", "<b>.png"):
        validate = ValidationResult(CHECKS, pictures=(picture("merged", name),))
        assert pictures.load(full(validate=validate), tmp_path / "report") == {}
        assert pictures.pictures(validate, {})[0].file in ("", name if "<" not in name and "/" not in name else "")


def test_compare_of_pipelines_takes_the_pictures_along(tmp_path: Path) -> None:
    written(tmp_path / "one")
    written(tmp_path / "other")
    files.compare(tmp_path / "one", tmp_path / "other", tmp_path / "both")
    assert {p.name for p in (tmp_path / "both" / "pictures").iterdir()} == {p.file for p in PICTURES}
    assert "<img" in (tmp_path / "both" / "report.html").read_text()


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("unet_t500_max_abs", "Largest difference of outputs at timestep 500, unet"),
        ("text_encoder_2_tensor_errors", "Merged tensors off by more than rounding, text_encoder_2"),
        ("onnx_fp16_vae_decoder_graph_max_abs",
         "Largest difference, same weights in PyTorch, vae_decoder (ONNX fp16)"),
        ("onnx_image_psnr", "PSNR of the picture, dB (ONNX)"),
        ("logits_max_abs", "Largest logit difference"),
        ("unet_dance", "Unet dance"),
    ],
)  # fmt: skip
def test_check_label_of_a_model_names_it(name: str, label: str) -> None:
    assert check_label(name) == label


def test_check_threshold_of_psnr_is_the_least() -> None:
    assert check_threshold(Check("onnx_image_psnr", 120.0, 98.0, True)) == "≥ 98"


# --- refusals and seals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        (StoryOptions(max_size=10**8), "--max-size"),
        (StoryOptions(merged_folder=False), "--no-merged-folder"),
        (StoryOptions(extra_arms=("plugged",)), "--arm plugged"),
        (StoryOptions(validation=ValidationOptions(min_survival=0.5)), "--min-survival"),
        (StoryOptions(validation=ValidationOptions(prompts=Path("p.txt"))), "--prompts"),
        (StoryOptions(validation=ValidationOptions(text=Path("t.txt"))), "--text"),
    ],
)
def test_refuse_text_options_names_the_flag(options: StoryOptions, flag: str) -> None:
    with pytest.raises(InputError, match=f"{flag} with a pipeline of images"):
        refuse_text_options(options)
    refuse_text_options(StoryOptions(extra_arms=("pytorch",)))


# --- the whole -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def style(bases: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny pipeline, and an adapter of it in kohya's names."""
    from tests.diffusion.files import make

    base, path = bases("sd15"), tmp_path_factory.mktemp("style") / "style.safetensors"
    make(path, base, "sd15")
    return base, path


def arguments(style: tuple[Path, Path], output: Path, *more: str) -> list[str]:
    return ["merge-and-export", "-b", str(style[0]), "-a", str(style[1]), "-o", str(output), *more]


def test_story_of_a_pipeline_refuses_before_any_work(style: tuple[Path, Path], tmp_path: Path) -> None:
    for more, words in (
        (("--max-size", "100MB"), "--max-size with a pipeline of images"),
        (("--precision", "int4", "--keep", "auto"), "--keep auto"),
        (("--combine", "ties", "--density", "0.5"), "no unmerged forward"),
    ):
        result = CliRunner().invoke(cli, arguments(style, tmp_path / "run", *more))
        assert result.exit_code == 1 and words in result.output, result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_story_of_a_pipeline_leaves_a_run_that_verifies(
    style: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    result = CliRunner().invoke(cli, arguments(style, output, "--max-time", "4s"))
    assert result.exit_code == 0, result.output
    assert {p.name for p in output.iterdir()} == {"merged", "onnx", "report", "manifest.json"}
    report = files.load(output / "report")
    assert report.status == "passed" and report.validate and report.validate.passed
    assert report.benchmark and report.benchmark.graph_identical
    assert report.benchmark.graphs.keys() == {"unet", "text_encoder", "vae_encoder", "vae_decoder"}
    assert [p.arm for p in report.benchmark.pictures] == ["base", "merged"]
    assert "pytorch" in report.benchmark.cells[0].arms
    shown = {p.file for p in report.validate.pictures}
    assert shown and shown == {p.name for p in (output / "report" / "pictures").iterdir()}
    checks, _ = manifest.verify(output, style[0], [])
    assert all(c.passed for c in checks), checks
    (output / "report" / "pictures" / "base.png").write_bytes(b"")
    assert any(not c.passed for c in manifest.verify(output, None, [])[0])

    # the next run, with the graphs of this one, on a validation that fails
    import lora_export.validation.pipelines as room

    failed = ValidationResult((Check("unet_tensor_errors", 3, 0, False),), weight_errors=("unet: a.weight",))
    monkeypatch.setattr(room, "validate_pipeline", lambda *_, **__: failed)
    from lora_export.contracts import AdapterChoice, Source

    options = StoryOptions(export=ExportOptions(graph_from=output / "onnx"))
    again = tmp_path / "again"
    with pytest.raises(GateFailed, match="unet_tensor_errors is 3") as caught:
        merge_and_export(Source("sd15", style[0]), [AdapterChoice(style[1])], again, options, Silent())
    assert caught.value.tensor == "unet: a.weight"
    assert not again.exists() and (tmp_path / "again.failed" / "report" / "report.html").is_file()
    document = json.loads((tmp_path / "again.failed" / "report" / "report.json").read_text())
    assert document["status"] == "failed" and document["benchmark"] is None
