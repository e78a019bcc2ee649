"""The tables of README.md, tests/README.md and docs/ from the result files that they are about.

    python tools/figures.py            # write them again
    python tools/figures.py --check    # exit code 1 if one is not what its results say

A table stands between `<!-- figures: NAME -->` and `<!-- end -->`. NAME is a function of this file.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from generated import ROOT, settle
from overview import overview, pictures
from runtime_tables import runtime_commands, runtimes, runtimes_pictures, runtimes_refused
from tables import RESULTS, read, table

BLOCK = re.compile(r"<!-- figures: (\w+) -->\n(.*?)<!-- end -->", re.DOTALL)


def mb(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"


def percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")


def band(cell: dict[str, Any]) -> str:
    return f"{cell['ratio']:.3f} ({cell['ci_low']:.3f} to {cell['ci_high']:.3f})"


def merging() -> str:
    def row(what: str, result: str, arm: str) -> list[str]:
        summary = read(result)["summary"]
        found, process = summary[arm], summary["ours" if arm.startswith("ours") else arm]
        peak = mb(process["peak_rss_bytes"]["median"])
        return [what, f"{found['seconds']['median']:.2f} s", f"{found['to_cp']['median']:.2f}", peak]

    plain, stage = "merge-1.1B-lora-2026-11-24-201727.json", "ours: merge stage"
    rows = [
        row("merge, to memory (tmpfs)", plain, stage),
        row("the whole process, torch's import included", plain, "ours"),
        row("merge, to a disk, synced on both sides", "merge-1.1B-lora-2026-11-24-201839.json", stage),
        row("merge of an NF4 base, to memory", "merge-1.1B-lora-nf4-*.json", stage),
        row("merge of a DoRA, to memory", "merge-1.1B-dora-*.json", stage),
        row("merge of a 7B shape (13.5 GB), to a disk, synced, once", "merge-7B-lora-*.json", stage),
        row("PEFT: load, `merge_and_unload`, save, to memory", plain, "peft"),
    ]
    return table(["", "time", "× `cp -r`", "peak memory"], rows)


def others() -> str:
    found = read("merge-1.1B-lora-2026-11-24-223939.json")["summary"]
    names = {"ours": "lora-export, the whole process", "peft": "PEFT 0.21", "axolotl": "axolotl, shard by shard"}
    rows = [
        [words, f"{found[arm]['seconds']['median']:.1f} s", mb(found[arm]["peak_rss_bytes"]["median"])]
        for arm, words in names.items()
    ]
    return table(["1.1B, bf16, to memory", "time", "peak memory"], rows)


def certificate() -> str:
    found = read("merge-1.1B-lora-2026-11-30-193828.json")["summary"]
    rows = []
    for words, suffix in (("the command", ""), ("the merge alone", ": merge stage")):
        a, b = (found[f"{n}{suffix}"]["seconds"]["median"] for n in ("uncertified", "certified"))
        rows.append([words, f"{a:.2f} s", f"{b:.2f} s", f"{b / a - 1:+.0%}".replace("%", " %")])
    return table(["", "without a certificate", "with it", ""], rows)


def exporting() -> str:
    rows = []
    for precision, found in read("export-SmolLM2-135M-*.json")["precisions"].items():
        s = found["summary"]
        times = [f"{s[arm]['seconds']['median']:.1f} s" for arm in ("builder", "first", "next", "copy")]
        rows.append([precision, *times, mb(s["next"]["peak_rss_bytes"]["median"])])
    head = [
        "",
        "the builder alone",
        "first export",
        "next adapter",
        "`cp -r` of the export",
        "peak memory of the next",
    ]
    return table(head, rows)


def exporting_large() -> str:
    s = read("export-1.1B-*.json")["precisions"]["fp16"]["summary"]
    rows = [
        [words, f"{s[arm]['seconds']['median']:.1f} s", mb(s[arm]["peak_rss_bytes"]["median"])]
        for arm, words in (
            ("builder", "the builder alone"),
            ("first", "first export"),
            ("next", "next adapter, every linear layer touched"),
            ("copy", "`cp -r` of the export"),
        )
    ]
    return table(["random 1.1B Llama, bf16 to fp16, once", "time", "peak memory"], rows)


def encoder() -> str:
    found = read("encoder-*.json")
    nodes = f"{found['nodes']['ours']} nodes, Optimum's O2 {found['nodes']['optimum']}"
    rows = [[f"{c['batch']} × {c['prompt']}", band(c)] for c in found["benchmark"]["cells"]]
    return table([f"batch × tokens ({nodes})", "our time ÷ Optimum's (90 % interval)"], rows)


def memory() -> str:
    rows = [
        [f"{size} ({f['bytes'] / 1e9:.1f} GB)", *(mb(f[k]["peak_rss_bytes"]) for k in ("merge", "export", "next"))]
        for size, f in read("memory-*.json")["sizes"].items()
    ]
    return table(["model", "`merge`", "first `export`", "next, with `--graph-from`"], rows)


def latency() -> str:
    cells = read("latency-SmolLM2-*/report.json")["benchmark"]["cells"]
    rows = []
    for c in sorted(cells, key=lambda c: str(c["phase"])):
        arms = [band(c["arms"][a]) for a in ("merged", "unmerged", "plugged")]
        rows.append([c["phase"], *arms, percent(c["noise_floor"]), c["verdict"]])
    head = ["", "merged ÷ base", "unmerged ÷ base", "plugged in ÷ base", "spread of base ÷ base", "test at ±1 %"]
    return table(head, rows)


def verdicts() -> str:
    studies = read("verdicts-*.json")["studies"]
    rows = []
    for ratio in sorted({s["ratio"] for s in studies}):
        some = [s for s in studies if s["ratio"] == ratio]
        cells = []
        for verdict in ("equivalent", "slower"):
            shares = [s.get(verdict, 0) / s["studies"] for s in some]
            total = sum(s["studies"] for s in some)
            low, high = min(shares), max(shares)
            cells.append(f"0 of {total:,}" if high == 0 else f"{low * 100:.1f}–{high * 100:.1f} %")
        rows.append([f"{ratio:g}", *cells])
    return table(["true ratio", "equivalent", "slower"], rows)


def checks() -> str:
    """Of identical graphs: how often a check leads to a full measurement."""
    studies = read("checks-*.json")["studies"]
    rows = []
    for ratio in sorted({s["ratio"] for s in studies}):
        some = [s for s in studies if s["ratio"] == ratio]
        shares = [s["again"] / s["studies"] for s in some]
        total = sum(s["studies"] for s in some)
        low, high = min(shares), max(shares)
        rows.append([f"{ratio:g}", f"{low * 100:.1f}–{high * 100:.1f} %" if high else f"0 of {total:,}"])
    return table(["true ratio", "measured again, in full"], rows)


def graph_faults() -> str:
    found = read("graph-faults-*.json")
    rows = []
    for kind in dict.fromkeys(r["kind"] for r in found["faults"]):
        faults, honest = ([r for r in found[rows] if r["kind"] == kind] for rows in ("faults", "honest"))
        counts = (sum(r["caught"] for r in faults), sum(r["false_alarm"] for r in honest))
        lost = sum(r["keeps_too_little"] for r in honest)
        rows.append([kind, str(len(faults)), str(counts[0]), str(len(honest)), str(counts[1]), str(lost)])
    return table(["model", "faults", "caught", "honest exports", "false alarms", "too little kept"], rows)


def sensitivity() -> str:
    s = read("sensitivity-*.json")["summary"]
    rows = [
        ["seeded faults", str(s["faults"])],
        ["caught by outputs alone", str(s["caught_by_outputs"])],
        ["caught by outputs and tensors", str(s["caught"])],
        ["the tensor named first was a spoiled one", str(s["named"])],
        ["module found without recomputing tensors", str(s["module_named_by_outputs"])],
        ["honest merges, and false alarms among them", f"{s['honest']}, {len(s['false_alarms'])}"],
    ]
    return table(["SmolLM2 in bf16, two adapters", ""], rows)


def combining() -> str:
    found: dict[str, tuple[float, float]] = {}
    for name in ("sums", "pruning"):
        methods = read(f"combine-1.1B-{name}-*.json")["methods"]
        one = methods["one adapter"]["seconds"]
        found |= {m: (v["peak_rss_bytes"], v["seconds"] / one) for m, v in methods.items() if m != "one adapter"}
    names = ["in turn", "linear", "svd", "dare_linear", "dare_ties", "magnitude_prune", "ties"]
    rows = [
        ["peak memory", *(mb(found[n][0]) for n in names)],
        ["time, one adapter = 1", *(f"{found[n][1]:.1f}" for n in names)],
    ]
    return table(["", "none", *names[1:]], rows)


def serving() -> str:
    found = read("switch-SmolLM2-*.json")["results"]
    rows = []
    for kind in ("swapped", "plugged"):
        cells = []
        for field in ("step_ratio", "switch_ms"):
            for precision in ("fp32", "fp16", "int4"):
                value = found[precision]["live"][field].get(kind)
                if value is None:
                    cells.append("–")
                else:
                    cells.append(f"{value:.2f}" if field == "step_ratio" else f"{value['median']:.1f} ms")
        rows.append([f"`{kind.title()}`", *cells])
    phases = [f"{what}, {p}" for what in ("step", "switch") for p in ("fp32", "fp16", "int4")]
    return table(["", *phases], rows)


def vllm() -> str:
    rows = []
    for mode in ("compiled", "eager"):
        name = f"vllm-{mode}-*.json"
        for c in read(name)["cells"] if mode == "compiled" or any(RESULTS.glob(name)) else []:
            arms = [band(c["arms"][a]) for a in ("base again", "merged", "base, LoRA on", "unmerged")]
            rows.append([f"{mode}, {c['phase']}, batch {c['batch']}", *arms])
    head = ["time ÷ base's (90 % interval)", "base again", "merged", "a base request, LoRA on", "unmerged adapter"]
    return table(head, rows)


def continued() -> str:
    return "\n" + (RESULTS / "training-2026-11-26" / "continued.md").read_text(encoding="utf-8").strip() + "\n\n"


def sizes() -> str:
    found = read("sizes-*.json")
    rows = [
        [
            f"SmolLM2-135M, {r['precision']}",
            mb(r["bytes"]),
            mb(r["tables"]),
            f"{percent(r['kept'])} of the effect",
            f"{r['perplexity']:.1f} ({r['perplexity_fp32']:.1f} in fp32)",
        ]
        for r in found["SmolLM2-135M"]
    ]
    rows += [
        [f"MiniLM, {r['precision']}", mb(r["bytes"]), mb(r["tables"]), f"cosine {r['cosine']:.4f}", "–"]
        for r in found["all-MiniLM-L6-v2"]
    ]
    return table(["export", "folder", "embeddings and head", "what is kept", "perplexity"], rows)


def triton() -> str:
    """Load on Triton's server: a row a level of concurrency."""
    found = read("triton-*.json")
    rows = [
        [
            load["what"],
            f"{load['concurrency']}",
            f"{load['requests']:,}",
            f"{load['errors']} and {load['wrong']}",
            f"{load['per_second']:,.1f}",
            f"{load['p50_ms']:,.1f} ms",
            f"{load['p99_ms']:,.1f} ms",
            f"{load['requests'] / load['runs']:.1f}" if load["runs"] else "–",
        ]
        for load in found["loads"]
    ]
    head = [
        "Triton " + found["server"],
        "at once",
        "requests",
        "errors and wrong answers",
        "a second",
        "p50",
        "p99",
        "in a run",
    ]
    return table(head, rows)


def bases() -> str:
    found = read("quality-SmolLM2-*.json")["bases"]
    words = {
        "trained": "adapter on the 4-bit base, as trained",
        "dequantized": "merged into the dequantized base",
        "original": "merged into the original base",
        "requantized": "merged, then put back into NF4",
    }
    rows = [[words[b["base"]], f"{b['perplexity']:.2f}", f"{b['kl_trained']:.2g}"] for b in found["bases"]]
    return table(["", "perplexity", "KL from trained"], rows)


def demo() -> str:
    sys.path.insert(0, str(ROOT / "examples"))
    from demo import ending

    return f"\n```text\n{ending(read('demo-*.json'), Path('demo-output'))}\n```\n\n"


def mutants() -> str:
    found = read("mutants-*.json")["files"]
    rows = []
    for name, told in found.items():
        tried = sum(told.values()) - told["not_run"]
        rows.append([f"`{name}`", f"{tried}", f"{told['noticed']}", percent(told["noticed"] / tried)])
    noticed, tried = (sum(int(row[i]) for row in rows) for i in (2, 1))
    rows.append(["all", f"{tried}", f"{noticed}", percent(noticed / tried)])
    return table(["file", "mutants", "noticed", ""], rows)


def openvino() -> str:
    found = read("openvino-*.json")
    rows = []
    for phase, told in found["phases"].items():
        for runtime, words in (("onnxruntime", "ONNX Runtime"), ("openvino", "OpenVINO")):
            arms = [told["ratios"][f"{runtime} {arm} / {runtime} base"] for arm in ("merged", "again")]
            beside = told["ratios"]["openvino merged / onnxruntime merged"]
            other = band(beside) if runtime == "openvino" else "1"
            rows.append([phase, words, f"{told['median_ms'][f'{runtime} merged']:.1f} ms", other, *map(band, arms)])
    threads = f"{found['threads']} thread{'s' * (found['threads'] > 1)}"
    head = ["merged ÷ ONNX Runtime's (90 % interval)", "merged ÷ base", "base ÷ base, the noise"]
    return table([f"{found['model']}, fp32, {threads}", "", "merged", *head], rows)


def inspected() -> str:
    return f"\n```text\n{(RESULTS / 'inspect-lora-speeches.txt').read_text(encoding='utf-8').strip()}\n```\n\n"


TABLES: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (
        merging, others, certificate, exporting, exporting_large, encoder, memory, latency, verdicts, checks,
        sensitivity, graph_faults, combining, serving, vllm, continued, sizes, triton, bases, mutants,
        demo, inspected, openvino, runtimes, runtimes_pictures, runtime_commands, runtimes_refused,
        overview, pictures,
    )
}  # fmt: skip


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "tests" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def renewed(text: str) -> str:
    """The page with every table as the results have it."""
    return BLOCK.sub(lambda m: f"<!-- figures: {m[1]} -->\n{TABLES[m[1]]()}<!-- end -->", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    settle(((page, renewed(page.read_text(encoding="utf-8"))) for page in pages()), check)


if __name__ == "__main__":
    main()
