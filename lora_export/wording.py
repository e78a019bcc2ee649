"""How results are worded, alike on the terminal, in reports and in packages: verdicts, checks, counts, figures."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import get_args

from lora_export.choices import Precision, Verdict
from lora_export.contracts import (
    BenchmarkResult,
    CacheUse,
    Check,
    ExportResult,
    MergeResult,
    Proof,
    QuantizationSummary,
    ValidationResult,
)
from lora_export.contracts.report import Report

DASH = "–"
_UNITS = ("B", "kB", "MB", "GB", "TB")

VERDICTS: Mapping[Verdict, str] = {
    "equivalent": "equivalent",
    "equivalent_by_structure": "equivalent by structure",
    "slower": "slower",
    "inconclusive": "inconclusive",
}
# Whether the optimized graph of the merged model is that of the base.
GRAPH: Mapping[bool | None, str] = {True: "identical", False: "differs", None: "not compared"}

_CHECK_LABELS = {
    "logits_max_abs": "Largest logit difference",
    "logits_kl_mean": "Mean KL divergence of the next token",
    "top1_agreement": "Same most likely token",
    "top5_agreement": "Same five most likely tokens",
    "run_to_run_max_abs": "Same model run twice",
    "perplexity_unmerged": "Perplexity, unmerged",
    "perplexity_merged": "Perplexity, merged",
    "perplexity_base": "Perplexity, base",
    "greedy_agreement": "Same greedy continuation",
    "noise_floor_max_abs": "Noise floor",
    "adapter_survival": "Adapter effect retained",
    "kl": "Mean KL divergence from the merged model",
    "graph_max_abs": "Largest logit difference, same weights in PyTorch",
    "graph_kl_mean": "Mean KL divergence, same weights in PyTorch",
    "padded_max_abs": "Largest difference in a padded batch, same weights in PyTorch",
    "padded_kl_mean": "Mean KL divergence in a padded batch, same weights in PyTorch",
    "weight_errors": "Tensors exported with wrong values",
    "quantization_errors": "Errors of quantized weights that are not as stated",
    "tensor_errors": "Merged tensors off by more than rounding",
    "tensor_max_error": "Largest error of a merged tensor, in bounds of rounding",
    "stored_tensors_differ": "Untouched tensors that differ",
    "pipeline_files_differ": "Files beside the weights that differ",
    "latents_relative": "Relative difference of the latents after sampling",
    "image_psnr": "PSNR of the picture, dB",
    "adapter_effect_psnr": "PSNR of the base's picture, dB",
    "max_abs": "Largest difference of outputs",
    "loads": "Weights that its class does not take",
}
_COMPONENT = re.compile(
    r"(?P<name>(?:unet|transformer|text_encoder|vae|prior|image_encoder|model)(?:_(?:\d|encoder|decoder))?)_"
    r"(?:t(?P<time>\d+)_)?(?P<check>\w+)"
)
_MODELS = {"onnx_": " (ONNX)", "loaded_": " (in its own type)"}
_OF_BASE = "base_"


# --- verdicts ------------------------------------------------------------------------------------------------


def overall_verdict(report: Report) -> str:
    """A benchmark alone that could not decide anything is no pass."""
    if report.status != "passed":
        return "Failed: do not deploy this output"
    stages = (report.merge, report.validate, report.export)
    if report.benchmark and not any(stages) and report.benchmark.verdict == "inconclusive":
        return "No verdict"
    return "Passed"


def proof_in_words(proof: Proof) -> str:
    """An export's proof in a line: the figure, where it was, and what was not compared."""
    of = "of the graphs that this export took: " if proof.inherited else ""
    line = f"{of}within {proof.difference:.1e} of PyTorch, allowed {proof.allowed:.1e}, in {proof.cases} cases"
    line += f"; experts: {proof.experts}" if proof.experts else ""
    return line + "".join(f"; not compared: {what}" for what in proof.not_reached)


def calibration(export: ExportResult) -> str:
    """The text that numbers of an export were chosen on, in a line."""
    text = export.calibration
    if text is None:
        return DASH
    return f"{number(text.tokens)} tokens in {number(text.windows)} pieces, text {text.text_sha256[:16]}"


def quantized(how: QuantizationSummary) -> str:
    """How the weights of an export were rounded, in a line."""
    line = f"{how.quantizer}, {count(how.calibrated, 'weight')} by their outputs on the text"
    if how.data_free:
        example = f", such as {how.first_data_free}" if how.first_data_free else ""
        line += f"; {number(how.data_free)} to nearest, of which the text has no statistics (tables, "
        line += f"experts that few tokens reach{example})"
    return line


def output_error(how: QuantizationSummary) -> str:
    return DASH if how.worst is None else f"{percent(how.output_error)} in {how.worst}"


def latency_verdict(result: BenchmarkResult) -> str:
    return f"{VERDICTS[result.verdict]}, on {result.provider}"


def provider(result: BenchmarkResult) -> str:
    """Where the graphs ran, and whether that was seen in a profile."""
    return f"{result.provider}, {'verified' if result.provider_verified else 'not verified'}"


def adapter_tensors(merge: MergeResult) -> str:
    return f"{merge.adapter_tensors.get('used')} of {merge.adapter_tensors.get('total')}"


def tensors(merge: MergeResult) -> str:
    """What became of the tensors of the base, without what happened to none."""
    return ", ".join(f"{number(n)} {name}" for name, n in merge.tensors.items() if n) or DASH


def checks_passed(result: ValidationResult) -> str:
    return f"{sum(c.passed for c in result.checks)} of {len(result.checks)}"


# --- checks --------------------------------------------------------------------------------------------------


def check_label(name: str) -> str:
    """The name of a check for people: of `onnx_int4_top1_agreement`, "Same most likely token (ONNX int4)"."""
    prefix, model = next(((p, m) for p, m in _MODELS.items() if name.startswith(p)), ("", ""))
    rest = name.removeprefix(prefix)
    precision = next((p for p in get_args(Precision) if prefix and rest.startswith(f"{p}_")), "")
    rest = rest.removeprefix(f"{precision}_")
    of_base = bool(prefix) and rest.startswith(_OF_BASE)
    rest = rest.removeprefix(_OF_BASE) if of_base else rest
    label = _CHECK_LABELS.get(rest) or _of_component(rest) or rest.replace("_", " ").capitalize()
    return label + (", base" if of_base else "") + (f" (ONNX {precision})" if precision else model)


def _of_component(name: str) -> str:
    """The label of a check of one model of a pipeline, perhaps at a timestep; nothing for other checks."""
    match = _COMPONENT.fullmatch(name)
    if match is None or match["check"] not in _CHECK_LABELS:
        return ""
    time = f" at timestep {match['time']}" if match["time"] else ""
    label = "Largest difference, same weights in PyTorch" if match["check"] == "graph_max_abs" else ""
    return f"{label or _CHECK_LABELS[match['check']]}{time}, {match['name']}"


def check_value(check: Check) -> str:
    return "not a number" if math.isnan(check.value) else number(check.value, 4)


def check_threshold(check: Check) -> str:
    if check.threshold is None:
        return DASH
    at_least = any(word in check.name for word in ("agreement", "survival", "psnr"))
    return f"{'≥' if at_least else '≤'} {number(check.threshold, 4)}"


def decibels(psnr: float) -> str:
    """How near two pictures are."""
    return "the same, bit for bit" if psnr == math.inf else f"{number(psnr)} dB"


# --- figures -------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """To significant digits, without trailing zeros; small and large ones as 1.2e-5."""
    if value is None:
        return DASH
    if not math.isfinite(value):
        return str(value)
    if value == 0 or (isinstance(value, int) and abs(value) < 10**7):
        return f"{value:,}" if isinstance(value, int) else "0"
    if 1e-3 <= abs(value) < 1e6:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{decimals}f}"
        return text.rstrip("0").rstrip(".") if decimals else text
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def milliseconds(value: float | None) -> str:
    if value is None:
        return DASH
    return f"{value:,.3f}" if value < 10 else f"{value:,.2f}"


def ratio(value: float | None) -> str:
    return DASH if value is None else f"{value:.4f}"


def interval(low: float | None, high: float | None) -> str:
    return DASH if low is None or high is None else f"{low:.4f} … {high:.4f}"


def percent(value: float | None, decimals: int = 2) -> str:
    return DASH if value is None else f"{value:.{decimals}%}"


def size(value: float | None) -> str:
    """Of a file or of memory, in decimal units."""
    if value is None:
        return DASH
    amount, unit = float(value), 0
    while amount >= 1000 and unit < len(_UNITS) - 1:
        amount, unit = amount / 1000, unit + 1
    return f"{amount:,.0f} B" if unit == 0 else f"{amount:,.2f} {_UNITS[unit]}"


def seconds(value: float | None) -> str:
    return DASH if value is None else f"{value:,.1f} s"


def count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def cache(use: CacheUse) -> str:
    """What a run took of its base from the cache, and what it left there."""
    if not use.parts:
        return "not used: " + "; ".join(use.notes)
    taken = [part.what for part in use.parts if part.taken]
    made = [part.what for part in use.parts if not part.taken]
    told = [f"taken of the base: {_parts(taken)}"] if taken else []
    return "; ".join([*told, *([f"computed: {_parts(made)}"] if made else [])])


def _parts(names: Sequence[str]) -> str:
    answers = [name for name in names if name not in ("export", "measurement")]
    counted = [count(len(answers), "answer")] if answers else []
    return ", ".join([*(n for n in names if n == "export"), *counted, *(n for n in names if n == "measurement")])
