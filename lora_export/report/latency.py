"""What a report says about latency: tables, how it was measured, and what the verdict does not show."""

from collections.abc import Mapping

from lora_export import wording
from lora_export.contracts import ArmTimes, BenchmarkResult, Cell, GraphComparison, Percentile
from lora_export.escape import one_line
from lora_export.wording import count, interval, milliseconds, number, percent, ratio, size

Row = tuple[str, ...]
Pairs = tuple[tuple[str, str], ...]  # of each table cell the text, and its interval or nothing
_RATE = "Tokens per second"
ARMS_HEAD = ("Arm", "p50, ms", "p95, ms", "p99, ms", _RATE, "÷ base", "Memory")
PARTS_HEAD = ("Part", "Optimized graph", "Nodes", "Canonical hash")
PICTURES_HEAD = ("Arm", "A picture, seconds", "Steps", "Pixels")
BY_VALUES = (
    "Values of weights are no part of the graph. Denormal, infinite or NaN weights slow some processors down, "
    "tokens that choose other experts read other weights, and a GPU at its power limit is faster on some values "
    "than on others: only the timings can show that."
)
CONDITIONS_HEAD = ("Cell", "Reading", "Minimum", "Median", "Maximum")
_READINGS = {
    "load": "load average",
    "steal": "CPU time stolen by the host, %",
    "others": "CPU time used by other processes, %",
    "cpu_mhz": "CPU clock, MHz",
    "sm_mhz": "clock, MHz",
    "memory_mhz": "memory clock, MHz",
    "power_w": "power, W",
    "temperature_c": "temperature, °C",
    "used_mb": "memory in use, MB",
}


def cell_name(cell: Cell) -> str:
    graph = " · CUDA graph" if cell.cuda_graph else ""
    if cell.phase == "denoise":
        return f"denoiser step · batch {cell.batch} · latent {cell.prompt} × {cell.prompt}{graph}"
    return f"{cell.phase} · batch {cell.batch} · {cell.prompt} tokens{graph}"


def of_pipeline(bench: BenchmarkResult) -> bool:
    """Whether the step of a denoiser was measured, not a language model."""
    return any(cell.phase == "denoise" for cell in bench.cells)


def arms_head(bench: BenchmarkResult) -> Row:
    return tuple("Latents per second" if of_pipeline(bench) and h == _RATE else h for h in ARMS_HEAD)


def margin_of(bench: BenchmarkResult) -> float | None:
    margin = bench.environment.margin
    return margin if margin is not None and 0 < margin <= 1 else None


def sentence(bench: BenchmarkResult) -> str:
    """For the head of the page."""
    cells, provider = bench.cells, one_line(bench.provider).upper()
    if bench.verdict == "equivalent":
        worst = max((c.ci_high for c in cells if c.ci_high), default=None)
        measured = "the one cell" if len(cells) == 1 else f"all {len(cells)} cells"
        text = f"On {provider} it is as fast as the base, within {_margin(bench, 0)}, in {measured} measured"
        return text + (f" (upper bound {percent(worst - 1)})." if worst else ".")
    if bench.verdict == "slower":
        slow = [c for c in cells if c.verdict == "slower"]
        worst = max((c.ratio for c in slow if c.ratio), default=None)
        text = f"On {provider} it is slower than the base in {len(slow)} of {count(len(cells), 'cell')}"
        return text + (f", by up to {percent(worst - 1, 1)}." if worst else ".")
    if bench.verdict == "equivalent_by_structure":
        return (
            f"On {provider} it is equivalent to the base by structure: both are one optimized graph, for all "
            f"shapes of its inputs.{_checked(bench)} No test at {_margin(bench, 0)} is claimed."
        )
    text = f"The latency comparison on {provider} was inconclusive; the reasons are below."
    if bench.graph_identical:  # a report from before this had a verdict of its own
        text += " The optimized graphs of base and merged are identical, so the graph cannot make a difference."
    return text


def _checked(bench: BenchmarkResult) -> str:
    """What was measured beside a verdict that does not rest on it."""
    cells = [(c.ratio, c.ci_low, c.ci_high) for c in bench.cells if c.ratio and c.ci_low and c.ci_high]
    if not cells:
        return ""
    ratios, lows, highs = zip(*cells, strict=True)
    many = f"in {len(cells)} cells, from {ratio(min(ratios))} to {ratio(max(ratios))}"
    where = many if len(cells) > 1 else ratio(ratios[0])
    of = "90 % intervals within" if len(cells) > 1 else "90 % interval"
    return f" Measured ratio {where} ({of} {interval(min(lows), max(highs))})."


def _margin(bench: BenchmarkResult, decimals: int) -> str:
    margin = margin_of(bench)
    return f"±{percent(margin, decimals)}" if margin else "the margin"


# --- tables ------------------------------------------------------------------------------------------------


def rows(bench: BenchmarkResult) -> list[Row]:
    """Cell, base, merged, unmerged, ratio, interval, noise floor, unmerged's ratio, blocks, verdict."""
    return [
        (
            cell_name(c),
            milliseconds(c.base_ms),
            milliseconds(c.merged_ms),
            milliseconds(c.unmerged_ms),
            ratio(c.ratio),
            interval(c.ci_low, c.ci_high),
            percent(c.noise_floor),
            ratio(c.unmerged_ratio),
            number(c.pairs) + (f" in {c.sessions} sets" if c.sessions > 1 else ""),
            wording.VERDICTS[c.verdict],
        )
        for c in bench.cells
    ]


def arm_tables(bench: BenchmarkResult) -> list[tuple[str, list[Pairs]]]:
    """For each cell its title, and a row for each arm."""
    return [(_title(c), [_arm_row(name, arm) for name, arm in c.arms.items()]) for c in bench.cells if c.arms]


def _title(cell: Cell) -> str:
    merged = cell.arms.get("merged")
    first = merged.first_token_ms if merged else None
    notes = [
        f"time to first token {milliseconds(first)} ms, merged" if first else "",
        "cache in place" if cell.kv_in_place else "",
        f"control: {one_line(cell.control)}" if cell.control else "",
    ]
    details = "; ".join(note for note in notes if note)
    return f"{cell_name(cell)} ({details})" if details else cell_name(cell)


def _arm_row(name: str, arm: ArmTimes) -> Pairs:
    return (
        (one_line(name), ""),
        *((milliseconds(p.ms), between(p)) for p in (arm.p50, arm.p95, arm.p99)),
        (number(arm.tokens_per_second, 4), ""),
        (ratio(arm.ratio), interval(arm.ci_low, arm.ci_high) if arm.ratio else ""),
        (size(arm.memory_bytes), ""),
    )


def between(p: Percentile) -> str:
    return f"{milliseconds(p.low)} … {milliseconds(p.high)}"


def part_rows(bench: BenchmarkResult) -> list[Row]:
    """The graphs of a pipeline's parts, merged beside base."""
    return [
        (
            one_line(part),
            "the base's own" if g.identical else "differs from the base's",
            number(g.nodes),
            _hashes(g),
        )
        for part, g in bench.graphs.items()
    ]


def picture_rows(bench: BenchmarkResult) -> list[Row]:
    return [(one_line(p.arm), number(p.seconds), number(p.steps), f"{p.size} × {p.size}") for p in bench.pictures]


def facts(bench: BenchmarkResult) -> list[Row]:
    identical = {True: "yes, so the graph cannot make a difference", False: "no", None: wording.GRAPH[None]}
    graph, margin = bench.graph, margin_of(bench)
    return [
        ("Execution provider", one_line(wording.provider(bench))),
        ("Same optimized graph as the base", identical[bench.graph_identical]),
        *([("Canonical hash, base and merged", _hashes(graph))] if graph else []),
        *([("Nodes by provider", _placement(graph.placement))] if graph and graph.placement else []),
        ("Margin, set before measuring", f"±{percent(margin, 1)}"),
        ("Noise floor (base against itself)", percent(bench.noise_floor)),
        ("Time", wording.seconds(bench.seconds) + (", ended early" if bench.ended_early else "")),
    ]


def _hashes(graph: GraphComparison) -> str:
    return ", ".join(dict.fromkeys(one_line(sha)[:16] for sha in (graph.base_sha256, graph.merged_sha256)))


def _placement(placement: Mapping[str, int]) -> str:
    return ", ".join(f"{one_line(provider)} {number(n)}" for provider, n in placement.items())


def conditions(bench: BenchmarkResult) -> list[Row]:
    """What the machine did while each cell was measured."""
    return [
        (one_line(cell), *_condition(name, values))
        for cell, readings in bench.environment.blocks.items()
        for name, values in readings.items()
    ]


def _condition(name: str, values: tuple[float | str, ...]) -> Row:
    if name == "throttled":
        return "throttled", ", ".join(map(one_line, values)), "", ""
    gpu, _, rest = name.partition("_")
    card = f"GPU {gpu.removeprefix('gpu')}: " if gpu.startswith("gpu") and rest in _READINGS else ""
    label = card + _READINGS.get(rest if card else name, one_line(name))
    texts = [one_line(v) if isinstance(v, str) else number(v) for v in values[:3]]
    return label, *texts, *[""] * (3 - len(texts))


def forest_caption(bench: BenchmarkResult) -> str:
    text = "Merged against the base with its 90 % interval; in grey, the base against itself."
    text += f" The band is the margin of {_margin(bench, 1)}." if margin_of(bench) else ""
    if bench.verdict == "equivalent_by_structure":
        text += " Equivalent by structure: whether an interval lies in the band does not matter."
    return text


def overheads_caption(bench: BenchmarkResult) -> str:
    if of_pipeline(bench):
        return (
            "What the other arms cost against the base's graph. PyTorch is another runtime: what merging saves "
            "there is the way from pytorch_base to pytorch, the denoiser without and with the adapter beside it."
        )
    return "What merging saves: how much slower than the base the other arms were, with 90 % intervals."


# --- in words ----------------------------------------------------------------------------------------------


def method(bench: BenchmarkResult) -> list[str]:
    """How it was measured, in five sentences."""
    arms = list(dict.fromkeys(one_line(name) for c in bench.cells for name in c.arms))
    sets = _sets(bench)
    names = f" ({', '.join(arms)})" if arms else ""
    return [
        f"All arms{names} and a second session of the base ran in one process, with the same options and the "
        "same bound buffers, and were warmed up until their medians stopped drifting.",
        "They were timed in blocks. Each block runs the arms in a random order and then in the reverse order, so "
        "that drift and background load affect all arms alike"
        + ("; PyTorch runs last in each block, because its threads keep spinning." if "pytorch" in arms else "."),
        "Each block gives one ratio of medians. The reported ratio is their trimmed mean, and its 90 % interval "
        + (
            f"comes from the spread between {sets} sets of sessions, each opened anew and in another order."
            if sets > 1
            else "is bootstrapped from runs of neighbouring blocks, because neighbouring blocks are correlated."
        ),
        *_rule(bench),
    ]


def _rule(bench: BenchmarkResult) -> list[str]:
    """How the verdict follows, in the last two sentences."""
    if bench.verdict == "equivalent_by_structure":
        end = (
            "It was a check: it ended as soon as merged was not slower, because nothing else could change the "
            "verdict; --max-time measures until the noise allows a test."
            if bench.ended_early
            else f"The test at {_margin(bench, 1)} did not pass in every cell; the notes say why."
        )
        return [
            "“Equivalent by structure” means that ONNX Runtime makes the same graph of base and merged, on the "
            "same provider, and that merged was not measured slower by more than the margin, or not again in other "
            "sessions.",
            end,
        ]
    controls = sorted({one_line(c.control) for c in bench.cells if c.control})
    return [
        f"“Equivalent” means that the whole interval lies within {_margin(bench, 1)}, a margin that was set before "
        "measuring (two one-sided tests at 5 %). The noise alone decides how many blocks are measured, never the "
        "difference.",
        "There is no verdict if the two sessions of the base differ by more than the margin, unless merged is "
        f"slower by more than both, or if {' or '.join(controls) or 'the unmerged graph'}, which does more work, "
        "was not found slower.",
    ]


def limits(bench: BenchmarkResult) -> list[str]:
    """What nobody should read into the verdict."""
    shapes = ", ".join(dict.fromkeys(f"{c.batch} × {c.prompt}" for c in bench.cells)) or "none"
    one_set = ", and for one set of sessions: --sessions measures how sets differ" if _sets(bench) == 1 else ""
    of, beyond = (
        ("batch sizes and sides of the latent", "The prompt's encoders, the scheduler and the picture's decoder")
        if of_pipeline(bench)
        else (
            "batch sizes and prompt lengths",
            "Tokenizing, sampling, scheduling requests and sending data to a client",
        )
    )
    by_structure = bench.verdict == "equivalent_by_structure"
    texts = [
        f"Only these {of} were measured: {shapes}."
        + (" For all others the graph alone speaks." if by_structure else ""),
        *([BY_VALUES] if by_structure else []),
        f"{beyond} are not included.",
        f"It holds for this machine, these versions and this execution provider{one_set}.",
        "It does not cover throughput under load, when many requests compete.",
    ]
    if any(c.kv_in_place is False and c.phase == "decode" for c in bench.cells):
        texts.append("Steps copied the KV cache, in all arms alike; a runtime that writes in place is faster.")
    if bench.provider == "cpu":
        texts.append("It was measured on a CPU; on a GPU the relative cost of an unmerged adapter is different.")
    return texts


def _sets(bench: BenchmarkResult) -> int:
    return max((c.sessions for c in bench.cells), default=1)


def warnings(bench: BenchmarkResult) -> list[str]:
    return [one_line(text) for text in bench.graph.warnings] if bench.graph else []
