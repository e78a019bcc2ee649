"""What a report says of latency: tables, how it was measured, and what the verdict does not say."""

from collections.abc import Iterator, Mapping
from typing import Any

from lora_export.escape import one_line
from lora_export.report.text import DASH, count, interval, milliseconds, number, percent, ratio, seconds, size

Row = tuple[str, ...]
Pairs = tuple[tuple[str, str], ...]  # of each table cell what is said, and its interval or nothing
ARMS_HEAD = ("Arm", "p50, ms", "p95, ms", "p99, ms", "Tokens per second", "÷ base", "Memory")
CONDITIONS_HEAD = ("Cell", "Reading", "Least", "Median", "Most")
_READINGS = {
    "load": "load average",
    "steal": "time taken by the host, %",
    "others": "time taken by other processes, %",
    "cpu_mhz": "CPU clock, MHz",
    "sm_mhz": "clock, MHz",
    "memory_mhz": "memory clock, MHz",
    "power_w": "power, W",
    "temperature_c": "temperature, °C",
    "used_mb": "memory in use, MB",
}


def cell_name(cell: Mapping[str, Any]) -> str:
    graph = " · CUDA graph" if cell["cuda_graph"] else ""
    return f"{one_line(cell['phase'])} · batch {cell['batch']} · {cell['prompt']} tokens{graph}"


def cell_key(cell: Mapping[str, Any]) -> str:
    graph = "/cuda_graph" if cell["cuda_graph"] else ""
    return f"b{cell['batch']}/p{cell['prompt']}/{cell['phase']}{graph}"


def margin_of(bench: Mapping[str, Any]) -> float | None:
    margin = (bench.get("environment") or {}).get("margin")
    return float(margin) if isinstance(margin, (int, float)) and 0 < margin <= 1 else None


def sentence(bench: Mapping[str, Any]) -> str:
    """For the head of the page."""
    cells, provider = bench["cells"], one_line(bench["provider"]).upper()
    margin = percent(margin_of(bench), 0) if margin_of(bench) else "the margin"
    if bench["verdict"] == "equivalent":
        worst = max((c["ci_high"] for c in cells if c["ci_high"]), default=None)
        text = f"On {provider} it is as fast as the base, within ±{margin}, in {_all(len(cells))}"
        return text + (f" (upper bound {percent(worst - 1)})." if worst else ".")
    if bench["verdict"] == "slower":
        slow = [c for c in cells if c["verdict"] == "slower"]
        worst = max((c["ratio"] for c in slow if c["ratio"]), default=None)
        text = f"On {provider} it is slower than the base in {len(slow)} of {count(len(cells), 'cell')}"
        return text + (f", by up to {percent(worst - 1, 1)}." if worst else ".")
    text = f"The latency comparison on {provider} gave no verdict; the reasons are below."
    if bench.get("graph_identical"):
        text += " The optimised graphs of base and merged are identical, so no difference can come from them."
    return text


def _all(n: int) -> str:
    return "the one cell measured" if n == 1 else f"all {n} cells measured"


# --- tables ------------------------------------------------------------------------------------------------


def rows(bench: Mapping[str, Any]) -> list[Row]:
    """Cell, base, merged, unmerged, ratio, interval, noise floor, unmerged's ratio, blocks, verdict."""
    return [
        (
            cell_name(c),
            milliseconds(c["base_ms"]),
            milliseconds(c["merged_ms"]),
            milliseconds(c["unmerged_ms"]),
            ratio(c["ratio"]),
            interval(c["ci_low"], c["ci_high"]),
            percent(c["noise_floor"]),
            ratio(c["unmerged_ratio"]),
            number(c.get("pairs")) + (f" in {c['sessions']} sets" if c.get("sessions", 1) > 1 else ""),
            one_line(c["verdict"]),
        )
        for c in bench["cells"]
    ]


def arm_tables(bench: Mapping[str, Any]) -> list[tuple[str, list[Pairs]]]:
    """For each cell its name, and a row for each arm."""
    found = []
    for cell in bench["cells"]:
        arms = cell.get("arms") or {}
        if arms:
            found.append((_titled(cell), [_arm_row(name, arm) for name, arm in arms.items()]))
    return found


def _titled(cell: Mapping[str, Any]) -> str:
    first = [a["first_token_ms"] for n, a in cell["arms"].items() if n == "merged" and a.get("first_token_ms")]
    notes = [f"time to first token {milliseconds(first[0])} ms, merged"] if first else []
    notes += ["cache in place"] if cell.get("kv_in_place") else []
    notes += [f"control: {one_line(cell['control'])}"] if cell.get("control") else []
    return f"{cell_name(cell)} ({'; '.join(notes)})" if notes else cell_name(cell)


def _arm_row(name: str, arm: Mapping[str, Any]) -> Pairs:
    return (
        (one_line(name), ""),
        *((milliseconds(arm[p]["ms"]), _between(arm[p])) for p in ("p50", "p95", "p99")),
        (number(arm["tokens_per_second"], 4), ""),
        (ratio(arm["ratio"]), interval(arm["ci_low"], arm["ci_high"]) if arm["ratio"] else ""),
        (size(arm["memory_bytes"]), ""),
    )


def _between(p: Mapping[str, Any]) -> str:
    if p["low"] is None or p["high"] is None:
        return ""
    return f"{milliseconds(p['low'])} … {milliseconds(p['high'])}"


def facts(bench: Mapping[str, Any]) -> list[Row]:
    identical = {True: "yes, so no difference can come from the graph", False: "no", None: "not compared"}
    verified = "verified" if bench["provider_verified"] else "not verified"
    graph = bench.get("graph") or {}
    return [
        ("Execution provider", f"{one_line(bench['provider'])}, {verified}"),
        ("Same optimised graph as the base", identical[bench.get("graph_identical")]),
        *([("Canonical hash, base and merged", _hashes(graph))] if graph else []),
        *([("Nodes by provider", _placement(graph))] if graph.get("placement") else []),
        ("Margin, set beforehand", f"±{percent(margin_of(bench), 1)}"),
        ("Noise floor (base against itself)", percent(bench.get("noise_floor"))),
        ("Time", seconds(bench.get("seconds"))),
    ]


def _hashes(graph: Mapping[str, Any]) -> str:
    base, merged = (one_line(graph[f"{side}_sha256"])[:16] for side in ("base", "merged"))
    return base if base == merged else f"{base}, {merged}"


def _placement(graph: Mapping[str, Any]) -> str:
    return ", ".join(f"{one_line(provider)} {number(n)}" for provider, n in graph["placement"].items())


def conditions(bench: Mapping[str, Any]) -> list[Row]:
    """What each cell's blocks found the machine doing."""
    found: list[Row] = []
    blocks = (bench.get("environment") or {}).get("blocks")
    for key, readings in (blocks if isinstance(blocks, Mapping) else {}).items():
        for name, values in readings.items() if isinstance(readings, Mapping) else ():
            if isinstance(values, list) and len(values) == 3:
                found.append(
                    (one_line(key), _reading(name), *(number(v) if _is_number(v) else DASH for v in values))
                )
            elif isinstance(values, list):
                found.append((one_line(key), "throttled", ", ".join(map(one_line, values)), "", ""))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _reading(name: str) -> str:
    gpu, _, rest = str(name).partition("_")
    if gpu.startswith("gpu") and rest in _READINGS:
        return f"GPU {gpu.removeprefix('gpu')}: {_READINGS[rest]}"
    return _READINGS.get(str(name), one_line(name))


# --- in words ----------------------------------------------------------------------------------------------


def method(bench: Mapping[str, Any]) -> list[str]:
    """How it was measured, in five sentences."""
    margin = percent(margin_of(bench), 1) if margin_of(bench) else "the margin"
    arms = list(dict.fromkeys(one_line(n) for c in bench["cells"] for n in (c.get("arms") or {})))
    sets = max((c.get("sessions") or 1 for c in bench["cells"]), default=1)
    listed = f" ({', '.join(arms)})" if arms else ""
    controls = {c.get("control") for c in bench["cells"]} - {None}
    named = " or ".join(sorted(map(one_line, controls))) or "the unmerged graph"
    return [
        f"All arms{listed} and a second session of the base ran in one process, with the same options and the "
        "same bound buffers, warmed up until their medians stopped drifting.",
        "They were timed in blocks, each a random order and its reverse, so that drift and whatever else the "
        "machine does falls on all of them alike"
        + (
            "; PyTorch comes after them in each block, as its threads go on spinning." if "pytorch" in arms else "."
        ),
        "Each block gives one ratio of medians; their trimmed mean is the figure, and its 90 % interval comes from "
        + (
            f"the spread between {sets} sets of sessions, each opened anew and in another order."
            if sets > 1
            else "drawing runs of neighbouring blocks, because blocks that follow each other are alike."
        ),
        f"Equivalent means that this whole interval lies within ±{margin}, a margin that was set beforehand "
        "(two one-sided tests at 5 %); the number of blocks followed from the noise, never from the difference.",
        "There is no verdict where base differs from base by more than the margin, unless merged is slower by more "
        f"than both, or where {named}, which does more work, was not found slower.",
    ]


def limits(bench: Mapping[str, Any]) -> list[str]:
    """What nobody should read into the verdict."""
    shapes = ", ".join(dict.fromkeys(f"{c['batch']} × {c['prompt']}" for c in bench["cells"])) or "none"
    said = [
        f"Other batch sizes and prompt lengths than these were not measured: {shapes}.",
        "Time for tokenizing, sampling, scheduling requests and moving data to a client is not in it.",
        "It holds for this machine, these versions and this execution provider"
        + (", and for one set of sessions: --sessions measures how sets differ." if _one_set(bench) else "."),
        "It says nothing of throughput under load, when many requests compete.",
    ]
    if any(not c.get("kv_in_place") and c["phase"] == "decode" for c in bench["cells"] if "kv_in_place" in c):
        said.append("Steps copied their cache, in all arms alike; a runtime that writes in place is faster.")
    if one_line(bench["provider"]) == "cpu":
        said.append("It was measured on a CPU; on a GPU an unmerged adapter costs other shares than here.")
    return said


def _one_set(bench: Mapping[str, Any]) -> bool:
    return all((c.get("sessions") or 1) == 1 for c in bench["cells"])


def warnings(bench: Mapping[str, Any]) -> Iterator[str]:
    yield from (one_line(text) for text in (bench.get("graph") or {}).get("warnings") or ())
