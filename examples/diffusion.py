"""The whole story on a pipeline of images: a tiny SDXL that paints the sea by day, and a LoRA that makes evening.

    python examples/diffusion.py --out demo-output-diffusion

Makes the pipeline and trains it for some seconds, then the LoRA; saves the LoRA as trainers of the field do, one
.safetensors file with kohya's names and an alpha for each module; runs `lora-export merge-and-export` on both; and
says where the report with the pictures is. Pipeline and LoRA are kept for the next time. A run that is there is
shown again and not repeated; delete the folder, or give --again, to repeat it.
"""

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE, LATENT = 64, 16  # pixels and numbers along a side
ENCODER_WIDTH, TOKENS = 32, 77
TRAINED_STEPS = {"decoder": 120, "denoiser": 120, "lora": 150}
BATCH = 4
PLACE = torch.tensor([[float(SIDE), SIDE, 0, 0, SIDE, SIDE]])  # SDXL's sizes and crop
DAY = {"top": (0.25, 0.55, 0.95), "low": (0.75, 0.9, 1.0), "sun": (1.0, 0.95, 0.4), "sea": (0.1, 0.45, 0.7)}
EVENING = {"top": (0.05, 0.05, 0.2), "low": (0.9, 0.4, 0.25), "sun": (1.0, 0.9, 0.7), "sea": (0.05, 0.08, 0.25)}
ADAPTER = "evening.safetensors"
RANK, CONVOLUTION_RANK = 16, 8


# --- what is painted -----------------------------------------------------------------------------------------


def paintings(generator: torch.Generator, colours: dict[str, tuple[float, ...]], count: int = BATCH) -> Tensor:
    """Seas under a sun somewhere: (count, 3, SIDE, SIDE) in [-1, 1]."""
    line = torch.linspace(0, 1, SIDE)
    y, x = line[:, None], line[None, :]
    top, low, sun, sea = (torch.tensor(colours[name])[:, None, None] for name in ("top", "low", "sun", "sea"))
    horizon, painted = 0.62, []
    for across, down in torch.rand((count, 2), generator=generator):
        east, height = 0.3 + 0.4 * across, 0.2 + 0.25 * down
        depth = (y / horizon).clamp(0, 1)
        disc = ((0.16 - torch.hypot(x - east, y - height)) / 0.03).clamp(0, 1)
        sky = (1 - disc) * ((1 - depth) * top + depth * low) + disc * sun
        glitter = 0.5 * torch.exp(-(((x - east) / 0.1) ** 2)) * (0.6 + 0.4 * torch.sin(70 * y))
        painted.append(torch.where(y > horizon, (1 - glitter) * sea + glitter * sun, sky))
    return torch.stack(painted) * 2 - 1


def latents(pictures: Tensor) -> Tensor:
    """What the decoder of this pipeline reads: the picture itself, small, and its brightness."""
    small = F.avg_pool2d(pictures, SIDE // LATENT)
    return torch.cat([small, small.mean(1, keepdim=True)], 1)


# --- the pipeline --------------------------------------------------------------------------------------------


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Of a CLIP tokenizer that spells: each byte as a letter, inside of a word and at its end."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    letters = [*map(chr, printable), *(chr(256 + n) for n in range(len(rest)))]
    merges = [("s", "e"), ("se", "a</w>"), ("t", "h"), ("th", "e</w>")]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in merges)]
    return {word: n for n, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}, merges


def text_encoder(kind: str, activation: str) -> Any:
    import transformers

    words = vocabulary()[0]
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        bos_token_id=words["<|startoftext|>"],
        eos_token_id=words["<|endoftext|>"],
        pad_token_id=words["<|endoftext|>"],
        hidden_size=ENCODER_WIDTH,
        intermediate_size=2 * ENCODER_WIDTH,
        num_attention_heads=4,
        num_hidden_layers=2,
        hidden_act=activation,
        projection_dim=ENCODER_WIDTH,
    )
    return getattr(transformers, kind)(config)


def new_pipeline() -> Any:
    import diffusers
    import transformers

    words, merges = vocabulary()
    tokenizers = [transformers.CLIPTokenizer(vocab=words, merges=merges, model_max_length=TOKENS) for _ in range(2)]
    unet = diffusers.UNet2DConditionModel(
        sample_size=LATENT,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        cross_attention_dim=2 * ENCODER_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + ENCODER_WIDTH,
        norm_num_groups=8,
    )
    vae = diffusers.AutoencoderKL(
        sample_size=SIDE,
        latent_channels=4,
        block_out_channels=(16, 32, 32),
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        norm_num_groups=8,
        scaling_factor=1.0,
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        steps_offset=1,
        prediction_type="sample",
    )
    return diffusers.StableDiffusionXLPipeline(
        vae,
        text_encoder("CLIPTextModel", "quick_gelu"),
        text_encoder("CLIPTextModelWithProjection", "gelu"),
        *tokenizers,
        unet,
        scheduler,
    )


def save_pipeline(pipeline: Any, folder: Path) -> None:
    pipeline.save_pretrained(folder, safe_serialization=True)
    words, merges = vocabulary()
    for name in ("tokenizer", "tokenizer_2"):  # other libraries read these two files
        (folder / name / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
        lines = "".join(f"{a} {b}\n" for a, b in merges)
        (folder / name / "merges.txt").write_text(f"#version: 0.2\n{lines}", encoding="utf-8")


# --- training ------------------------------------------------------------------------------------------------


def train_decoder(pipeline: Any, generator: torch.Generator) -> None:
    """To paint in full size what the latents hold in small."""
    vae = pipeline.vae
    weights = [*vae.post_quant_conv.parameters(), *vae.decoder.parameters()]
    optimizer = torch.optim.Adam(weights, 3e-3)
    for step in range(TRAINED_STEPS["decoder"]):
        pictures = paintings(generator, (DAY, EVENING)[step % 2])
        loss = F.mse_loss(vae.decode(latents(pictures)).sample, pictures)
        descend(optimizer, loss)


def train_denoiser(pipeline: Any, weights: Iterable[nn.Parameter], colours: Any, what: str, rate: float) -> None:
    """To tell the picture from a noisy one, whatever the prompt says: Ho et al. 2020, predicting the picture."""
    generator = torch.Generator().manual_seed(len(what))
    optimizer = torch.optim.Adam(weights, rate)
    kept = pipeline.scheduler.alphas_cumprod
    for step in range(TRAINED_STEPS[what]):
        clean = latents(paintings(generator, colours))
        times = torch.randint(0, len(kept), (BATCH,), generator=generator)
        share = kept[times].view(-1, 1, 1, 1)
        noisy = share.sqrt() * clean + (1 - share).sqrt() * torch.randn(clean.shape, generator=generator)
        states, pooled = embedded(pipeline, generator)
        added = {"text_embeds": pooled, "time_ids": PLACE.repeat(BATCH, 1)}
        loss = F.mse_loss(pipeline.unet(noisy, times, states, added_cond_kwargs=added).sample, clean)
        descend(optimizer, loss)
        if step % 40 == 39:
            print(f"  {what}: step {step + 1}, error {loss.item():.4f}", file=sys.stderr)


def embedded(pipeline: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What the text encoders make of prompts of random letters."""
    ids = torch.randint(0, len(vocabulary()[0]) - 2, (BATCH, TOKENS), generator=generator)
    first, second = (
        encoder(ids, output_hidden_states=True) for encoder in (pipeline.text_encoder, pipeline.text_encoder_2)
    )
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second.text_embeds


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


# --- the LoRA ------------------------------------------------------------------------------------------------


def train_lora(pipeline: Any) -> dict[str, Tensor]:
    """LoRA on attention, feed-forward layers and convolutions of the UNet and on the first text encoder."""
    from peft import LoraConfig

    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        getattr(pipeline, name).requires_grad_(False)
    layers = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "proj_in", "proj_out", "conv1", "conv2"]
    convolutions = dict.fromkeys(("conv1", "conv2"), CONVOLUTION_RANK)
    half = {name: rank / 2 for name, rank in convolutions.items()}
    pipeline.unet.add_adapter(
        LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers, rank_pattern=convolutions, alpha_pattern=half)
    )
    projections = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    pipeline.text_encoder.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=projections))
    trained = {"lora_unet_": pipeline.unet, "lora_te1_": pipeline.text_encoder}
    weights = [p for model in trained.values() for p in model.parameters() if p.requires_grad]
    train_denoiser(pipeline, weights, EVENING, "lora", 8e-3)
    return {name: tensor for prefix, model in trained.items() for name, tensor in as_kohya(prefix, model)}


def as_kohya(prefix: str, model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Tensors by the names of sd-scripts, with an alpha for each module."""
    from peft.tuners.lora import LoraLayer

    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            (key,) = layer.lora_A
            text = "text_model." if prefix != "lora_unet_" and not name.startswith("text_model.") else ""
            spelling = prefix + (text + name).replace(".", "_")
            yield f"{spelling}.lora_down.weight", layer.lora_A[key].weight.detach().half().contiguous()
            yield f"{spelling}.lora_up.weight", layer.lora_B[key].weight.detach().half().contiguous()
            yield f"{spelling}.alpha", torch.tensor(layer.scaling[key] * layer.r[key], dtype=torch.float16)


def prepare(cache: Path) -> tuple[Path, Path]:
    """The pipeline and the LoRA, trained unless they are there."""
    from safetensors.torch import save_file

    base, adapter = cache / "tiny-sdxl", cache / ADAPTER
    if base.is_dir() and adapter.is_file():
        return base, adapter
    started = time.monotonic()
    print("training a tiny SDXL that paints the sea by day, and a LoRA that makes it evening …", file=sys.stderr)
    be_silent()
    torch.manual_seed(0)
    pipeline = new_pipeline()
    train_decoder(pipeline, torch.Generator().manual_seed(1))
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        encoder.requires_grad_(False)
    train_denoiser(pipeline, pipeline.unet.parameters(), DAY, "denoiser", 2e-3)
    shutil.rmtree(base, ignore_errors=True)
    save_pipeline(pipeline, base)
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_base_model_version": "sdxl_base_v1-0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.title": "evening",
    }
    save_file(train_lora(pipeline), adapter, metadata=metadata)
    print(f"  in {time.monotonic() - started:.0f} s: {base}, {adapter}", file=sys.stderr)
    return base, adapter


def be_silent() -> None:
    """Warnings and progress bars of the libraries are not of this story."""
    import diffusers
    import transformers

    logging.disable(logging.WARNING)
    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()


def default_cache() -> Path:
    given = os.environ.get("LORA_EXPORT_CACHE")
    return Path(given or Path.home() / ".cache" / "lora-export") / "diffusion"


# --- the story -----------------------------------------------------------------------------------------------


def run_story(base: Path, adapter: Path, out: Path, extra: list[str]) -> int:
    """Run the command that a user would type, and print it first."""
    command = ["lora-export", "merge-and-export", "-b", str(base), "-a", str(adapter), "-o", str(out)]
    command += ["--size", str(SIDE), "--validation-seed", "2", "--max-time", "20s", "--force", *extra]
    # Two sessions of a graph this small differ by some per cent: a step takes two milliseconds.
    command += ["--sessions", "12"]
    print("$ " + " ".join(command), file=sys.stderr)
    return subprocess.run([sys.executable, "-m", "lora_export", *command[1:]], check=False).returncode


def show(out: Path) -> None:
    """The verdicts, from the run's own report, and where the pictures are."""
    report = json.loads((out / "report" / "report.json").read_text(encoding="utf-8"))
    print("\n" + ending(report, out))


def ending(report: dict[str, Any], out: Path) -> str:
    failed = [c["name"] for c in report["validate"]["checks"] if not c["passed"]]
    bench = report["benchmark"]
    cell = bench["cells"][-1]
    rows = [
        ("gates", report["status"] + (f": {', '.join(failed)}" if failed else "")),
        ("base and merged graphs", "identical" if bench["graph_identical"] else "differ"),
        ("denoiser step, merged/base", f"{cell['ratio']:.3f} ({said(cell)})"),
        ("report with pictures", str(out / "report" / "report.html")),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def said(cell: dict[str, Any]) -> str:
    """The verdict in words, and the interval of what was measured."""
    return f"{cell['verdict'].replace('_', ' ')}, {cell['ci_low']:.3f} to {cell['ci_high']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("demo-output-diffusion"))
    parser.add_argument("--again", action="store_true", help="run even if OUT is there")
    parser.add_argument("extra", nargs="*", help="further options for lora-export, after --")
    args = parser.parse_args()
    if args.again or not (args.out / "manifest.json").is_file():
        code = run_story(*prepare(default_cache()), args.out, args.extra)
        if code:
            raise SystemExit(code)
    else:
        print(f"{args.out} is there already; its results (delete it to run again):", file=sys.stderr)
    show(args.out)


if __name__ == "__main__":
    main()
