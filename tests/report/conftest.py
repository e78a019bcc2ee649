"""A report with every stage, made of the contracts, so that it fails when they change."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_export.contracts import (
    AdapterSurvival,
    ArmTimes,
    BaseComparison,
    BenchmarkResult,
    CalibrationRecord,
    Cell,
    Check,
    Continuation,
    Environment,
    ExportResult,
    Gpu,
    GraphComparison,
    MergeResult,
    NamedAdapter,
    NamedSource,
    NamedSources,
    Percentile,
    Perplexity,
    QuantizationSummary,
    Report,
    Samples,
    TensorRecord,
    ValidationResult,
)
from lora_export.contracts.report import SCHEMA_VERSION
from lora_export.report import files
from lora_export.storage.documents import decode, finite

MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj")


@pytest.fixture
def full() -> dict[str, Any]:
    report: dict[str, Any] = json.loads(json.dumps(full_report()))
    return report


@pytest.fixture
def timings() -> dict[str, dict[str, tuple[float, ...]]]:
    return raw_timings()


def full_report() -> dict[str, Any]:
    """A report with every stage, as JSON."""
    return files.to_json(
        Report(
            schema_version=SCHEMA_VERSION,
            title="support-bot-lora on SmolLM2-135M",
            created="2026-11-23T23:59:00+00:00",
            tool_version="0.1.0",
            status="passed",
            options={
                "merge": {"dtype": "keep", "max_memory": 2147483648},
                "precision": "fp32",
                "provider": "auto",
            },
            sources=NamedSources(
                NamedSource("example/SmolLM2-135M", "93efa2f097d58c2a74874c7e644dbc9b0cee75a2"),
                (NamedAdapter("support-bot-lora", weight=0.7),),
            ),
            merge=_merge(),
            validate=_validation(),
            export=_export(),
            benchmark=_benchmark(),
        )
    )


def read(document: dict[str, Any]) -> Report:
    return decode(json.loads(json.dumps(finite(document))), Report, "the report", "a test")


def write(document: dict[str, Any], folder: Path, samples: Samples | None = None) -> None:
    """A report that is given as JSON, with raw timings."""
    report = read(document)
    if report.benchmark:
        report = replace(report, benchmark=replace(report.benchmark, samples=samples or {}))
    files.write(report, folder)


def _merge() -> MergeResult:
    dice = np.random.default_rng(0)
    updated = tuple(
        TensorRecord(
            name=f"model.layers.{layer}.{module}.weight",
            operation="updated",
            dtype="BF16",
            shape=(576, 576),
            kinds=("lora",),
            relative_delta=float(0.01 + 0.03 * dice.random() + 0.0005 * layer),
            survival=float(1 - 0.02 * dice.random()),
            max_ulps=0.5,
            mean_ulps=0.25,
            checked=4608,
        )
        for layer in range(30)
        for module in MODULES
    )
    return MergeResult(
        output=Path("merged"),
        tensors={"copied": 123, "updated": 150, "replaced": 0, "dequantized": 0},
        adapter_tensors={"used": 300, "total": 300},
        seconds=2.41,
        peak_rss_bytes=412_000_000,
        delta_survival=0.9931,
        certificate=Path("merged/certificate.json"),
        base_weights="dequantized",
        dtype="bfloat16",
        records=(*updated, TensorRecord("model.norm.weight", "copied", "BF16", (576,))),
        warnings=("the adapter names another revision of the base",),
    )


def _validation() -> ValidationResult:
    dice = np.random.default_rng(1)
    return ValidationResult(
        checks=(
            Check("logits_max_abs", 0.0312, 0.0871, True, "three times the noise floor"),
            Check("logits_kl_mean", 6.8e-5, 2.1e-4, True, "three times rounding alone, measured here"),
            Check("top1_agreement", 0.998, 0.98, True, "what rounding alone leaves"),
            Check("perplexity_merged", 14.207, 14.44, True, "the unmerged model's, plus 1 %"),
            Check("onnx_logits_max_abs", 1.1e-4, 1e-3, True, "fp32 against fp32"),
        ),
        samples=(
            Continuation(
                prompt="Customer: my parcel has not arrived.\nAgent:",
                base=" The parcel is a parcel. The parcel is a parcel.",
                unmerged=" I am sorry to hear that. Could you tell me your order number?",
                merged=" I am sorry to hear that. Could you tell me your order number?",
                first_difference="prompt 1, token 15: unmerged ' number', here ' code'",
            ),
        ),
        kl_by_position=tuple(float(x) for x in 6e-5 * np.exp(dice.standard_normal(128))),
        perplexities=(
            Perplexity("base", 40.94, 612),
            Perplexity("unmerged", 28.82, 612),
            Perplexity("merged", 28.83, 612),
            Perplexity("onnx int4", 30.4, 612),
        ),
        adapter_survival=(AdapterSurvival("onnx int4", 0.93, 0.41, 0.07, 0.012, 0.003),),
        bases=(BaseComparison("dequantized", 56.65, 1e-5), BaseComparison("original", 50.81, 0.04)),
        advice=("Ship the dequantized merge: it is the function that was trained.",),
    )


def _export() -> ExportResult:
    return ExportResult(
        output=Path("onnx"),
        engine="genai",
        precision="fp32",
        nodes=342,
        seconds=9.7,
        files={"model.onnx": 170_928, "model.onnx.data": 540_157_184, "genai_config.json": 1455},
        calibration=CalibrationRecord("5f" * 32, 8192, 16),
        quantized=QuantizationSummary("gptq", 210, 1, "model.embed_tokens.weight", "model.norm.weight", 0.0213),
    )


def arms(base: float, tokens: int, **ratios: float) -> dict[str, ArmTimes]:
    """Times of the base and of arms that take so many times as long."""

    def times(name: str, ratio: float) -> ArmTimes:
        p50, p95, p99 = (
            Percentile(ms, 0.99 * ms, 1.01 * ms) for ms in (base * ratio, base * ratio * 1.1, base * ratio * 1.2)
        )
        known = (ratio, ratio * 0.99, ratio * 1.01) if name != "base" else (None, None, None)
        first = p50.ms if tokens > 1 else None
        return ArmTimes(p50, p95, p99, 1000 * tokens / p50.ms, first, 685_000_000, *known)

    return {name: times(name, ratio) for name, ratio in {"base": 1.0, **ratios}.items()}


def _benchmark() -> BenchmarkResult:
    common = {
        "batch": 1, "prompt": 128, "cuda_graph": False, "noise_floor": 0.0021, "pairs": 44, "kv_in_place": True,
        "control": "unmerged",
    }  # fmt: skip
    cells = (
        Cell(phase="prefill", base_ms=271.31, merged_ms=271.18, unmerged_ms=303.02, ratio=0.9996, ci_low=0.9961,
             ci_high=1.0032, verdict="equivalent", unmerged_ratio=1.117, unmerged_ci_low=1.109,
             unmerged_ci_high=1.126, arms=arms(271.31, 128, merged=0.9996, unmerged=1.117, plugged=1.12),
             **common),
        Cell(phase="decode", base_ms=23.91, merged_ms=23.94, unmerged_ms=26.72, ratio=1.0012, ci_low=0.9975,
             ci_high=1.0049, verdict="equivalent", unmerged_ratio=1.1182, unmerged_ci_low=1.1018,
             unmerged_ci_high=1.1377, arms=arms(23.91, 1, merged=1.0012, unmerged=1.1182, pytorch=3.6),
             **common),
    )  # fmt: skip
    return BenchmarkResult(
        provider="cpu",
        provider_verified=True,
        cells=cells,
        noise_floor=0.0021,
        graph_identical=True,
        verdict="equivalent",
        seconds=61.2,
        environment=Environment(
            cpu="Example CPU",
            margin=0.01,
            onnxruntime="1.31.1",
            gpus=(Gpu(name="Example GPU"),),
            blocks={
                "b1/p128/decode": {
                    "load": (0.1, 0.2, 0.3),
                    "gpu0_sm_mhz": (1200, 1980, 1980),
                    "throttled": ("power limit",),
                }
            },
        ),
        graph=GraphComparison(True, "5a" * 32, "5a" * 32, 309, {"CPUExecutionProvider": 339}),
        notes=("b1/p128/decode: latency still drifted by more than the margin when warm-up ended",),
    )


def raw_timings() -> dict[str, dict[str, tuple[float, ...]]]:
    dice = np.random.default_rng(2)
    centres = {"b1/p128/prefill": 271.0, "b1/p128/decode": 23.9}
    arms = {"base": 1.0, "base_again": 1.0, "merged": 1.0, "unmerged": 1.118, "pytorch": 4.0}

    def times(median: float) -> tuple[float, ...]:
        return tuple(float(t) for t in median * np.exp(0.02 * dice.standard_normal(176)))

    return {cell: {arm: times(centre * f) for arm, f in arms.items()} for cell, centre in centres.items()}
