"""A LoRA of rank 32 merged into a UNet of SDXL's real size (2.6 billion weights, fp16): beside `cp -r` of the same
bytes and, if asked for, diffusers' fuse_lora and save_pretrained; and `inspect` of an adapter file of 200 MB.

Every arm is a whole process. A repetition runs each arm once, in the other order every second time; ratios are
taken within a repetition. Weights are random, written block by block: no model is in memory but diffusers' own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from processes import (
    LORA_EXPORT,
    Arm,
    Command,
    Sample,
    circumstances,
    in_turn,
    measure,
    parsed,
    save,
    shown,
    spread,
)
from random_models import written_once

RANK, ALPHA = 32, 16.0
LARGE_RANK = 38  # of the adapter that is inspected: about 200 MB
SIGMA, SIGMA_UP = 0.02, 0.005
BLOCK = 2**24  # random values, which are repeated from other places
WEIGHTS = "diffusion_pytorch_model.safetensors"
UNET = {  # of stabilityai/stable-diffusion-xl-base-1.0, as its config.json says
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
COLUMNS = {
    "seconds": ("wall s", 1, ".2f"),
    "cpu_seconds": ("CPU s", 1, ".2f"),
    "peak_rss_bytes": ("peak MB", 1e6, ".0f"),
    "to_cp": ("× cp", 1, ".2f"),
}
Shapes = dict[str, tuple[int, ...]]
Summary = dict[str, dict[str, dict[str, float]]]


def make(work: Path) -> None:
    """The base in work/unet, and the adapters work/style.safetensors and work/large.safetensors."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel(**UNET)
    shapes: Shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    with written_once(work / "unet") as folder:
        if folder is not None:
            model.save_config(folder)
            write_random(folder / WEIGHTS, shapes, dict.fromkeys(shapes, SIGMA))
    for name, rank in (("style", RANK), ("large", LARGE_RANK)):
        path = work / f"{name}.safetensors"
        if not path.exists():
            tensors = adapter_shapes(shapes, rank)
            write_random(path, tensors, {n: SIGMA_UP if "lora_up" in n else SIGMA for n in tensors})


def adapter_shapes(shapes: Shapes, rank: int) -> Shapes:
    """Tensors of kohya's names, for every linear layer of attention and feed-forward."""
    found: Shapes = {}
    for name, shape in shapes.items():
        if "transformer_blocks" in name and name.endswith(".weight") and len(shape) == 2:
            module = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
            found |= {
                f"{module}.lora_down.weight": (rank, shape[1]),
                f"{module}.lora_up.weight": (shape[0], rank),
                f"{module}.alpha": (),
            }
    return found


def write_random(path: Path, shapes: Shapes, sigmas: Mapping[str, float]) -> None:
    """fp16, normal, alphas ALPHA; the same BLOCK values over and over, from a place that differs each time."""
    import torch

    from lora_export.checkpoint.header import build_header

    values = torch.empty(BLOCK).normal_(generator=torch.Generator().manual_seed(1))
    scaled = {s: (values * s).half().numpy().tobytes() for s in set(sigmas.values())}
    metadata = {"format": "pt"}
    with path.open("wb") as out:
        out.write(build_header([(n, "F16", s) for n, s in shapes.items()], metadata))
        place = 0
        for name, shape in shapes.items():
            if not shape:
                out.write(torch.tensor(ALPHA).half().numpy().tobytes())
                continue
            left = 2 * int(torch.tensor(shape).prod())
            while left:
                part = scaled[sigmas[name]][place : place + left]
                out.write(part)
                left -= len(part)
                place = (place + len(part)) % (2 * BLOCK)
            place = (place + 2 * 9973) % (2 * BLOCK)


def fuse(base: Path, adapter: Path, output: Path) -> None:
    """What a script without this project does: load, attach, fuse, save."""
    import torch
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(base, torch_dtype=torch.float16)
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(str(adapter), unet_config=unet.config)
    StableDiffusionXLPipeline.load_lora_into_unet(state, network_alphas=alphas, unet=unet)
    unet.fuse_lora()
    unet.unload_lora()
    unet.save_pretrained(output)


def run(options: argparse.Namespace) -> tuple[dict[str, int], list[Sample]]:
    """Bytes of base and adapters, and every sample. Outputs are removed, models stay in `options.work`."""
    work = options.work
    subprocess.run([sys.executable, __file__, "--make", "--work", work], check=True)
    base, adapter, large = work / "unet", work / "style.safetensors", work / "large.safetensors"
    with tempfile.TemporaryDirectory(prefix="bench-diffusion-", dir=options.out) as scratch:
        output = Path(scratch, "output")
        merge: Command = [LORA_EXPORT, "merge", "-b", base, "-a", adapter, "-o", output, "--json", "-q"]
        subprocess.run([*merge, "--dry-run"], check=True, stdout=subprocess.DEVNULL)  # compiles the code
        arms = [Arm("cp", ["cp", "-r", base, output], (base,), output), Arm("ours", merge, (base,), output)]
        how = {"sync": options.sync, "settle": options.settle}
        samples = in_turn(arms, options.repeat, **how)
        if options.with_diffusers:
            command: Command = [sys.executable, __file__, "--fuse", base, adapter, output]
            samples.append(measure(Arm("diffusers", command, (base,), output), 0, **how))
        inspect: Command = [LORA_EXPORT, "inspect", large]
        samples += in_turn([Arm("inspect", inspect, (), Path(scratch, "none"))], 2 * options.repeat - 1, settle=1)
    sizes = {"base": base / WEIGHTS, "adapter": adapter, "inspected": large}
    return {name: path.stat().st_size for name, path in sizes.items()}, samples


def summarize(samples: Sequence[Sample]) -> Summary:
    """Arm → column → median, min and max; ratios to the cp of the same repetition."""
    rows: dict[str, dict[str, list[float]]] = {}
    copies = {s.repetition: s.seconds for s in samples if s.arm == "cp"}
    for sample in samples:
        row = rows.setdefault(sample.arm, {c: [] for c in COLUMNS})
        for column in ("seconds", "cpu_seconds", "peak_rss_bytes"):
            row[column].append(getattr(sample, column))
        if sample.arm != "inspect":
            row["to_cp"].append(sample.seconds / copies[sample.repetition])
    return {name: {c: spread(values) for c, values in row.items() if values} for name, row in rows.items()}


def raw(sample: Sample) -> dict[str, Any]:
    if sample.arm != "ours":
        return sample.raw()
    said = json.loads(sample.said)
    own = {"merge_seconds": said["seconds"], "reported_peak_rss_bytes": said["peak_rss_bytes"]}
    return sample.raw() | own | {"tensors": said["tensors"]}


def table(summary: Summary) -> str:
    lines = [" " * 12 + "".join(f"{title:>25}" for title, _, _ in COLUMNS.values())]
    for name, row in summary.items():
        cells = (shown(row[c], unit, form) if c in row else "" for c, (_, unit, form) in COLUMNS.items())
        lines.append(f"{name:<12}" + "".join(f"{text:>25}" for text in cells))
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3, help="repetitions (default: %(default)s)")
    parser.add_argument("--with-diffusers", action="store_true", help="measure fuse_lora and saving, too, once")
    parser.add_argument(
        "--settle", type=float, default=4.0, help="seconds of rest before every run (default: %(default)s)"
    )
    parser.add_argument("--sync", action="store_true", help="fsync every output inside its time: for a disk")
    work = Path(tempfile.gettempdir(), "lora-export-bench-diffusion")
    parser.add_argument("--work", type=Path, default=work, help="keeps the models, 5.6 GB (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the outputs, 5.2 GB (default: --work)")
    parser.add_argument("--save", type=Path, help="JSON file to write (default: a new one in benchmarks/results)")
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--fuse", nargs=3, type=Path, help=argparse.SUPPRESS)
    return parsed(parser)


def main() -> None:
    options = parse()
    if options.make:
        return make(options.work)
    if options.fuse:
        return fuse(*options.fuse)
    load = [os.getloadavg()]
    sizes, samples = run(options)
    load.append(os.getloadavg())
    summary, around = summarize(samples), circumstances(options.work, options.out)
    print(f"{sizes['base'] / 1e9:.2f} GB, {options.repeat} repetitions, median (least–most)")
    print(table(summary))
    chosen = {name: getattr(options, name) for name in ("repeat", "sync", "settle", "with_diffusers")}
    chosen |= {"rank": RANK, "alpha": ALPHA, "inspected_rank": LARGE_RANK}
    document = around | {"options": chosen, "bytes": sizes, "load": load, "summary": summary}
    save(options.save, "merge-sdxl-unet", document | {"samples": [raw(s) for s in samples]})
    return None


if __name__ == "__main__":
    main()
