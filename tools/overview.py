"""The tables of several kinds of models at once: README's first screen, and pictures beside diffusers."""

from typing import Any

from tables import read, table


def overview() -> str:
    rows = [*_decoders(), _encoder(), _speech(), _pictures(), _fleet(), _served()]
    return table(["what was merged", "what came of it"], rows)


def pictures() -> str:
    names = {
        "cp": "`cp -r`",
        "ours": "lora-export, the whole process",
        "diffusers": "diffusers: load, `fuse_lora`, save",
    }
    rows = []
    for result, where in (
        ("merge-sdxl-unet-2026-11-30.json", ""),
        ("merge-sdxl-unet-quiet-*.json", ", on a quiet disk"),
    ):
        found = read(result)["summary"]
        for arm in (name for name in names if name in found):
            rows.append([names[arm] + where, f"{_seconds(found, arm):.1f} s", _memory(found, arm)])
    return table(
        ["a UNet of SDXL's size (5.1 GB), LoRA of rank 32, to a disk, synced", "time", "peak memory"], rows
    )


def _decoders() -> list[list[str]]:
    report = read("demo-*.json")
    checks = {c["name"]: c["value"] for c in report["validate"]["checks"]}
    same = "one graph with its base" if report["benchmark"]["graph_identical"] else "another graph than its base"
    small = (
        f"logits {checks['onnx_logits_max_abs']:.2g} from the unmerged model at most; rounding alone moves them by "
        f"{checks['onnx_noise_floor_max_abs']:.2g}; {checks['onnx_greedy_agreement']:.0%} of greedy tokens equal; "
        f"{same}"
    )
    found = read("merge-1.1B-lora-2026-11-30-193828.json")["summary"]
    whole, peft = (f"{found[arm]['seconds']['median']:.1f} s and {_memory(found, arm)}" for arm in ("ours", "peft"))
    proven, bare = (found[f"{arm}: merge stage"]["to_cp"]["median"] for arm in ("ours", "uncertified"))
    large = (
        f"merged in {whole}, imports included (PEFT: {peft}); the merge alone takes {proven:.2f} × `cp -r`, "
        f"{bare:.2f} × without its certificate"
    )
    return [
        ["**decoder**: SmolLM2-135M, to ONNX", small],
        ["**decoder**: a Llama of 1.1B in bf16, weights only", large],
    ]


def _encoder() -> list[str]:
    found = read("encoder-*.json")
    ratios = [cell["ratio"] for cell in found["benchmark"]["cells"]]
    latency = f"{min(ratios):.2f} to {max(ratios):.2f} × the time of Optimum's O2"
    text = f"{found['nodes']['ours']} nodes, {latency}; {_runtimes('all-MiniLM-L6-v2')}"
    return ["**encoder**: all-MiniLM-L6-v2", text]


def _speech() -> list[str]:
    return ["**speech**: whisper-tiny.en", _runtimes("whisper-tiny.en")]


def _runtimes(model: str) -> str:
    cells = [c for c in read("runtimes-*.json")["cells"] if c["name"] == model and c["result"] == "ok"]
    return f"the unmerged model's answers from {len({c['consumer'] for c in cells})} runtimes and versions of them"


def _pictures() -> list[str]:
    found = read("merge-sdxl-unet-2026-11-30.json")["summary"]
    text = (
        f"merged in {_seconds(found, 'ours'):.0f} s with {_memory(found, 'ours')} of memory "
        f"(`fuse_lora` and saving: {_seconds(found, 'diffusers'):.0f} s, {_memory(found, 'diffusers')})"
    )
    return ["**diffusion**: a UNet of SDXL's size", text]


def _fleet() -> list[str]:
    found = read("fleet-tiny-*.json")
    rows, beside, real = len(found["fleet"]["rows"]), found["beside"], read("fleet-smollm2-*.json")
    text = (
        f"merged, proven and exported in {beside['fleet_seconds']:.0f} s; one command for each would take "
        f"{beside['times_faster']:.0f} × as long, by {beside['commands_run']} that were run "
        f"({real['asked']['rows']} of SmolLM2: {real['fp32']['beside']['times_faster']:.1f} ×)"
    )
    return [f"**fleet**: {rows} tiny adapters, {' and '.join(found['asked']['precision'])}", text]


def _served() -> list[str]:
    cells = [c["arms"] for c in read("vllm-compiled-*.json")["cells"] if c["phase"] == "decode"]
    unmerged, merged = ([arms[name]["ratio"] for arms in cells] for name in ("unmerged", "merged"))
    text = (
        f"a token takes {min(merged):.2f} to {max(merged):.2f} × the base's time; with the adapter unmerged "
        f"{min(unmerged):.2f} to {max(unmerged):.2f} ×, also because vLLM then compiles nothing there"
    )
    return ["the decoder, served by vLLM on a CPU", text]


def _seconds(summary: dict[str, Any], arm: str) -> float:
    return float(summary[arm]["seconds"]["median"])


def _memory(summary: dict[str, Any], arm: str) -> str:
    return f"{summary[arm]['peak_rss_bytes']['median'] / 1e6:,.0f} MB"
