"""Results in words, for people; the JSON of --json has everything."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_export import wording
from lora_export.commands.talk import megabytes, table
from lora_export.contracts import (
    BenchmarkResult,
    ComponentMerge,
    ExportResult,
    Interference,
    MergeResult,
    ValidationResult,
    Verification,
)
from lora_export.escape import shown

if TYPE_CHECKING:
    from lora_export.adapter_tools import Derived

Rows = list[tuple[str, str]]


def merge_rows(result: MergeResult) -> Rows:
    survival = _survived(result.delta_survival)
    # A pipeline has the same checks for each component: "unet: shapes".
    checks = dict.fromkeys(f"{c.name.rpartition(': ')[2]} {c.outcome}" for c in result.base_checks)
    return [
        ("tensors", wording.tensors(result)),
        ("adapter", f"{wording.adapter_tensors(result)} tensors used"),
        *((name, _component(part)) for name, part in result.components.items()),
        ("base weights", f"{result.base_weights}, written as {result.dtype}"),
        ("right base?", ", ".join(checks) or "no adapter"),
        ("delta survival", survival),
        ("time, memory", f"{result.seconds:.1f} s, {megabytes(result.peak_rss_bytes)} peak"),
    ]


def _survived(share: float | None) -> str:
    return "no delta" if share is None else f"{share:.2%} after rounding"


def _component(part: ComponentMerge) -> str:
    kinds = ", ".join(f"{count} × {kind}" for kind, count in part.kinds.items())
    counts = f"{part.tensors['updated']} updated ({kinds}), {part.tensors['copied']} copied"
    return f"{counts}, {_survived(part.delta_survival)}"


WORST = 3  # tensors of each pair of adapters that are named


def interference_lines(pairs: Sequence[Interference]) -> list[str]:
    """How several adapters interfere: overall, and the tensors in which they oppose each other most."""
    lines = []
    for pair in (i for i in pairs if i.tensor is None):
        lines.append(f"{shown(pair.first)} and {shown(pair.second)}  {_lying(pair)}")
        tensors = [i for i in pairs if i.tensor and (i.first, i.second) == (pair.first, pair.second)]
        worst = sorted(tensors, key=lambda i: i.cosine)[:WORST]
        lines += [f"  {shown(str(i.tensor))}  {_lying(i)}" for i in worst]
    return ["interference (of unrelated adapters: cosine 0, half of the signs)", *lines] if lines else []


def _lying(pair: Interference) -> str:
    ratio = "–" if pair.norm_ratio is None else f"{pair.norm_ratio:.2f}"
    return f"cosine {pair.cosine:+.3f}, {pair.sign_conflicts:.1%} of signs in conflict, norms {ratio} to 1"


def derived_words(made: "Derived") -> str:
    """A new adapter: its size, its ranks, and what it costs."""
    ranks = sorted(made.ranks.values())
    if not ranks:
        span = "no module"
    elif ranks[0] == ranks[-1]:
        span = f"{ranks[0]} in {len(ranks)} modules"
    else:
        span = f"{ranks[0]} to {ranks[-1]}, {sum(ranks) / len(ranks):.1f} on average, in {len(ranks)} modules"
    rows = [
        ("rank", span),
        ("size", f"{made.parameters:,} numbers, {megabytes(made.bytes)}"),
        ("error", f"{made.error:.3g} of ‖ΔW‖, {made.energy_kept:.4%} of its square is kept"),
    ]
    rows += [("  most in", f"{one.module}: {one.error:.3g}") for one in made.worst if one.error > 1e-6]
    rows += [("saved whole", f"{len(made.whole)} tensors, {made.whole[0]} first")] if made.whole else []
    rows += [("left out", f"{len(made.dropped)} changed weights, {made.dropped[0]} first")] if made.dropped else []
    return table([*rows, ("output", str(made.output))])


def validation_words(result: ValidationResult) -> str:
    width = max(len(c.name) for c in result.checks)
    lines = []
    for c in result.checks:
        limit = "" if c.threshold is None else f"{c.threshold:>12.4g}"
        mark = "" if c.threshold is None and c.passed else ("ok" if c.passed else "FAILED")
        lines.append(f"{c.name:<{width}}  {c.value:>12.4g}  {limit:>12}  {mark:<6}  {shown(c.note)}")
    head = f"{'check':<{width}}  {'value':>12}  {'threshold':>12}"
    faulty = [f"not what the adapter makes of the base: {shown(name)}" for name in result.weight_errors[:10]]
    tables = [*_perplexity_lines(result), *_bases_lines(result), *_survival_lines(result)]
    return "\n".join(
        [
            head,
            *lines,
            *tables,
            *faulty,
            *_deviation(result),
            *map(shown, result.advice),
            *(f"merged with {option}, according to its certificate" for option in result.merge_options),
            *([] if result.seed is None else [f"drawn with seed {result.seed}; --validation-seed repeats it"]),
            "passed" if result.passed else "FAILED",
        ]
    )


def _perplexity_lines(result: ValidationResult) -> list[str]:
    return [f"perplexity {p.model:<20}  {p.value:>10.4f}  on {p.tokens} tokens" for p in result.perplexities]


def _bases_lines(result: ValidationResult) -> list[str]:
    return [
        f"merged into {b.base:<19}  {b.perplexity:>10.4f}  perplexity, KL from trained {b.kl_trained:.2e} nats"
        for b in result.bases
    ]


def _survival_lines(result: ValidationResult) -> list[str]:
    return [
        f"adapter in {s.model:<20}  {'no effect' if s.share is None else f'{s.share:.1%} left':>10}"
        + ("" if s.share_error is None else f" ± {s.share_error:.1%}")
        + ("" if s.kl_base is None else f"  KL base → merged {s.kl_base:.2e} nats, merged → model {s.kl_lost:.2e}")
        + ("" if s.kl_lost_error is None else f" ± {s.kl_lost_error:.1e}")
        for s in result.adapter_survival
    ]


def _deviation(result: ValidationResult) -> list[str]:
    """Where it goes wrong, in one line."""
    deviation = result.deviation
    if deviation is None:
        return []
    by = f"by {deviation.value:.3g} (noise floor {deviation.floor:.3g})"
    line = f"the first module that differs: {shown(deviation.module)}, {by}"
    return [line + (f", because of {shown(', '.join(deviation.tensors[:3]))}" if deviation.tensors else "")]


def verification_words(result: Verification) -> str:
    rows = [("ok" if c.passed else "FAILED", f"{c.name}: {c.note}") for c in result.checks]
    rows += [("not checked", text) for text in result.not_checked]
    return table([*rows, ("", result.verdict)])


def validation_row(result: ValidationResult) -> tuple[str, str]:
    by_name = {c.name: c.value for c in result.checks}
    parts = [f"{wording.checks_passed(result)} checks passed"]
    if "logits_max_abs" in by_name:
        floor = by_name.get("noise_floor_max_abs", 0.0)
        parts.append(f"logits within {by_name['logits_max_abs']:.2g} (noise floor {floor:.2g})")
    if "onnx_logits_max_abs" in by_name:
        parts.append(f"ONNX within {by_name['onnx_logits_max_abs']:.2g}")
    if "image_psnr" in by_name:
        effect = by_name.get("adapter_effect_psnr", 0.0)
        parts.append(f"picture {by_name['image_psnr']:.1f} dB from the unmerged one (the base's {effect:.1f} dB)")
    if "onnx_image_psnr" in by_name:
        parts.append(f"ONNX {by_name['onnx_image_psnr']:.1f} dB")
    for kept in (s for s in result.adapter_survival if s.share is not None):
        lost = "" if kept.kl_lost is None else f", KL {kept.kl_lost:.2g} nats from merged"
        parts.append(f"{shown(kept.model)} keeps {kept.share:.1%} of the adapter{lost}")
    return "validation", ", ".join(parts)


def export_row(result: ExportResult) -> tuple[str, str]:
    size = megabytes(sum(result.files.values()))
    return "export", f"{result.engine}, {result.precision}, {result.nodes} nodes, {size}, {result.seconds:.1f} s"


def calibration_rows(result: ExportResult) -> Rows:
    """The text, and what it decided; nothing for an export without one."""
    rows = [("calibrated on", wording.calibration(result))] if result.calibration else []
    if (how := result.quantized) is not None:
        rows += [("quantizer", shown(wording.quantized(how))), ("output error", shown(wording.output_error(how)))]
    return rows


def benchmark_rows(result: BenchmarkResult) -> Rows:
    graph = wording.GRAPH[result.graph_identical]
    rows = [("benchmark", f"{wording.VERDICTS[result.verdict]} (graph {graph}), {wording.provider(result)}")]
    for cell in result.cells:
        arms = {"base": cell.base_ms, "merged": cell.merged_ms, "unmerged": cell.unmerged_ms}
        times = [f"{name} {value:.2f} ms" for name, value in arms.items() if value is not None]
        ratio = ""
        if cell.ratio is not None and cell.ci_low is not None and cell.ci_high is not None:
            verdict = wording.VERDICTS[cell.verdict]
            ratio = f"; merged/base {cell.ratio:.4f} [{cell.ci_low:.4f}, {cell.ci_high:.4f}], {verdict}"
        graph_mark = ", CUDA graph" if cell.cuda_graph else ""
        of = "latent " if cell.phase == "denoise" else "p"
        name = f"  {cell.phase} b{cell.batch} {of}{cell.prompt}{graph_mark}"
        rows.append((name, ", ".join(times) + ratio))
    if result.pictures:
        one = result.pictures[0]
        times = [f"{p.arm} {p.seconds:.2f} s" for p in result.pictures]
        rows.append((f"  picture of {one.size} pixels, {one.steps} steps", ", ".join(times)))
    return rows
