"""Real shapes of denoisers traced without weights: nodes, seconds, and the peak of memory.

    python tools/trace_diffusion.py [sd15 sdxl sd3 flux] [--provider cuda] [--precision fp16]

A checkpoint is a header and holes, and what the engine writes are a graph and holes: nothing of the size of a model
is read, written or held. Each model has a process of its own, whose peak is told.
"""

import argparse
import json
import math
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Class, part of a pipeline, and what its configuration says beyond the defaults of the class.
MODELS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "sd15": ("UNet2DConditionModel", "unet", {"sample_size": 64, "cross_attention_dim": 768}),
    "sdxl": (
        "UNet2DConditionModel",
        "unet",
        {
            "sample_size": 128,
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "block_out_channels": [320, 640, 1280],
            "transformer_layers_per_block": [1, 2, 10],
            "use_linear_projection": True,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        "transformer",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
            "out_channels": 16,
        },
    ),
    "flux": ("FluxTransformer2DModel", "transformer", {"guidance_embeds": True}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--provider", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "fp16"])
    parser.add_argument("--here", action="store_true", help="in this process, one model")
    given = parser.parse_args()
    for name in given.models:
        if given.here:
            print(json.dumps(traced(name, given.provider, given.precision)))
            continue
        again = [sys.executable, __file__, name, "--here", "--provider", given.provider]
        done = subprocess.run(
            [*again, "--precision", given.precision], stdout=subprocess.PIPE, text=True, check=True
        )
        print(done.stdout.strip().splitlines()[-1], flush=True)


def traced(name: str, provider: str, precision: str) -> dict[str, Any]:
    """What the engine's process makes of a model of this shape."""
    import onnx

    from lora_export.onnx_export.engines import diffusion_process

    architecture, part, settings = MODELS[name]
    with tempfile.TemporaryDirectory(prefix="trace-") as scratch:
        model, output = Path(scratch, "model"), Path(scratch, "onnx")
        model.mkdir()
        output.mkdir()
        parameters = without_numbers(architecture, settings, model)
        started, cpu = time.monotonic(), time.process_time()
        diffusion_process.main(
            {
                "model": str(model),
                "output": str(output),
                "precision": precision,
                "provider": provider,
                "optimize": "full",
                "quantized": None,
                "architecture": architecture,
                "library": "diffusers",
                "part": part,
                "result": "made.json",
            }
        )
        graph = onnx.load(output / "model.onnx", load_external_data=False).graph
        kinds = Counter(node.op_type for node in graph.node if node.domain == "com.microsoft")
        return {
            "model": name,
            "parameters": parameters,
            "nodes": len(graph.node),
            "fused": dict(kinds.most_common()),
            "seconds": round(time.monotonic() - started, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
            "data_gb": round((output / "model.onnx_data").stat().st_size / 1e9, 2),
        }


def without_numbers(architecture: str, settings: Mapping[str, Any], folder: Path) -> int:
    """config.json, and a safetensors file in fp16 that is a header and a hole; returns how many numbers it has."""
    import diffusers
    import torch

    with torch.device("meta"):
        model = getattr(diffusers, architecture)(**settings)
    model.save_config(folder)
    header, at = {}, 0
    for name, value in model.state_dict().items():
        end = at + 2 * math.prod(value.shape)
        header[name] = {"dtype": "F16", "shape": list(value.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return at // 2


if __name__ == "__main__":
    main()
