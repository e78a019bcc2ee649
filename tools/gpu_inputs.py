"""What the GPU suite measures, made from seeds; called by gpu_suite.py, a process each.

    python tools/gpu_inputs.py experts FOLDER [--small]             # FOLDER/base, FOLDER/lora: experts of gpt-oss
    python tools/gpu_inputs.py unet FOLDER PRECISION PROVIDER [--small]    # the graph of a UNet, without weights
    python tools/gpu_inputs.py optimum MODEL FOLDER PRECISION       # Optimum's graph of a model, without weights
    python tools/gpu_inputs.py fill GRAPH FOLDER SEED               # a graph without weights, with some of a seed
    python tools/gpu_inputs.py placement GRAPH PROVIDER FILE        # who ran which node, in a prompt and a step
    python tools/gpu_inputs.py compare FOLDER FOLDER FILE           # the tensors of two checkpoints

A graph without weights is small enough to carry: how long it takes does not depend on its numbers.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx

GRAPH, DATA = "model.onnx", "model.onnx_data"
LARGE = 1024  # bytes; smaller numbers steer shapes and stay in the graph
ALIGNMENT = 256
SIGMA = 0.02
SMALL_UNET = {
    "sample_size": 16, "block_out_channels": [32, 64], "cross_attention_dim": 32, "attention_head_dim": 4,
    "layers_per_block": 1, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "norm_num_groups": 8,
}  # fmt: skip
# gpt-oss-20b with 2 of its 24 layers and a vocabulary of 32,000: 1.8 billion weights, nearly all in experts.
EXPERTS = {
    "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 2, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4,
    "vocab_size": 32_000, "layer_types": ["sliding_attention", "full_attention"], "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SMALL_EXPERTS = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "num_local_experts": 8, "vocab_size": 320, "sliding_window": 24, "max_position_embeddings": 512,
}  # fmt: skip


# --- graphs without weights --------------------------------------------------------------------------------


def strip(source: Path, folder: Path) -> None:
    """folder/model.onnx: the graph `source`, whose large floating-point weights lie at places of a file that is not
    there."""
    model = onnx.load(source, load_external_data=False)
    place = 0
    for tensor in model.graph.initializer:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        size = math.prod(tensor.dims) * dtype.itemsize
        if size < LARGE or dtype.kind != "f":
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                onnx.external_data_helper.load_external_data_for_tensor(tensor, str(source.parent))
                tensor.data_location = onnx.TensorProto.DEFAULT
                del tensor.external_data[:]
            continue
        for field in ("raw_data", "float_data", "int32_data"):
            tensor.ClearField(field)  # fp16 may lie in int32_data
        del tensor.external_data[:]
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", DATA), ("offset", place), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        place += -(-size // ALIGNMENT) * ALIGNMENT
    folder.mkdir(parents=True)
    (folder / GRAPH).write_bytes(model.SerializeToString())


def fill(skeleton: Path, folder: Path, seed: int) -> None:
    """folder/model.onnx and its data: normal numbers with σ 0.02, and with mean 1 where they scale channels."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    shutil.copyfile(skeleton / GRAPH, folder / GRAPH)
    with (folder / DATA).open("wb") as data:
        for tensor in onnx.load(skeleton / GRAPH, load_external_data=False).graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            about = {entry.key: entry.value for entry in tensor.external_data}
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            values = random.standard_normal(math.prod(tensor.dims), np.float32) * SIGMA
            data.seek(int(about["offset"]))
            data.write((values + (len(tensor.dims) == 1)).astype(dtype).tobytes())


def unet(folder: Path, precision: str, provider: str, small: bool) -> None:
    """The graph that this project exports of a UNet of Stable Diffusion 1.5."""
    from trace_diffusion import MODELS, without_numbers

    from lora_export.onnx_export.engines import diffusion_process

    architecture, part, settings = MODELS["sd15"]
    with tempfile.TemporaryDirectory(prefix="gpu-suite-") as scratch:
        model, output = Path(scratch, "model"), Path(scratch, "onnx")
        model.mkdir()
        output.mkdir()
        without_numbers(architecture, SMALL_UNET if small else settings, model)
        request = {
            "model": str(model), "output": str(output), "precision": precision, "provider": provider,
            "optimize": "full", "quantized": None, "architecture": architecture, "library": "diffusers",
            "part": part, "result": "made.json",
        }  # fmt: skip
        diffusion_process.main(request)
        strip(output / GRAPH, folder)


def optimum(model: Path, folder: Path, precision: str) -> None:
    """The graph that optimum-onnx exports of a decoder, in its own environment; in fp16, of the model in fp16."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from tests.consumers.environments import optimum_python

    with tempfile.TemporaryDirectory(prefix="gpu-suite-") as scratch:
        request = json.dumps([str(model.resolve()), scratch, precision])
        command = [optimum_python(), "-c", _OPTIMUM, request]
        done = subprocess.run(command, capture_output=True, text=True, cwd=scratch, check=False)
        if done.returncode:
            sys.exit(f"Optimum's export failed:\n{done.stderr[-3000:]}")
        strip(Path(scratch, GRAPH), folder)


# Rotary angles are the base's: transformers 4 reads rope_theta, transformers 5 writes rope_parameters.
_OPTIMUM = """
import json, sys, torch
from optimum.exporters.onnx import onnx_export_from_model
from transformers import AutoConfig, AutoModelForCausalLM
model, folder, precision = json.loads(sys.argv[1])
given = json.load(open(model + "/config.json"))
config = AutoConfig.from_pretrained(model)
config.rope_theta = given.get("rope_parameters", {}).get("rope_theta", 10000.0)
dtype = torch.float16 if precision == "fp16" else torch.float32
loaded = AutoModelForCausalLM.from_config(config).to(dtype).eval()
onnx_export_from_model(loaded, output=folder, task="text-generation-with-past", do_validation=False)
"""


# --- models ------------------------------------------------------------------------------------------------


def experts(folder: Path, small: bool) -> None:
    """base: a gpt-oss of random weights in bf16; lora: rank 16 on its attention."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model
    from random_models import ALPHA, RANK, write_tokenizer, written_once

    torch.manual_seed(1)
    config = transformers.GptOssConfig(**{**EXPERTS, **(SMALL_EXPERTS if small else {})})
    with written_once(folder) as partial:
        if partial is None:
            return
        model = transformers.GptOssForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(partial / "base")
        write_tokenizer(partial / "base")
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        wrapped = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=SIGMA)
        wrapped.save_pretrained(partial / "lora")


# --- what is looked at ---------------------------------------------------------------------------------------


def placement(graph: Path, provider: str) -> dict[str, Any]:
    """Of a prompt and a step: every node that ran, its operator and provider; copies between devices; strays."""
    from lora_export import runtime
    from lora_export.benchmarking.buffers import Buffers, Shape
    from lora_export.benchmarking.placement import profile_events, strays
    from lora_export.benchmarking.sessions import ArmSession

    told: dict[str, Any] = {"provider": provider}
    for phase in ("prefill", "decode"):
        with tempfile.TemporaryDirectory() as folder:
            arm = ArmSession(graph, provider, 1, profile=Path(folder, "profile"))
            arm.call(Shape.of(phase, 1, 128), Buffers(arm.device)).run()
            events = profile_events(Path(arm.session.end_profiling()))
        nodes = [(e["name"].removesuffix("_kernel_time"), e["args"]["op_name"], e["args"]["provider"])
                 for e in events if e.get("cat") == "Node" and e.get("args", {}).get("provider")]  # fmt: skip
        unique = dict.fromkeys(nodes)
        told[phase] = {
            "by_provider": dict(Counter(place for _, _, place in unique)),
            "copies": sorted(name for name, kind, _ in unique if kind.startswith("Memcpy")),
            "strays": strays(events, runtime.PROVIDERS[provider]),
            "nodes": list(unique),
        }
    return told


def compare(one: Path, other: Path) -> dict[str, Any]:
    """Share of equal numbers, and the largest difference in units of the larger number."""
    from lora_export.checkpoint import open_checkpoint

    left, right = open_checkpoint(one), open_checkpoint(other)
    if left.tensors.keys() != right.tensors.keys():
        sys.exit(f"other tensors: {sorted(left.tensors.keys() ^ right.tensors.keys())[:5]}")
    equal = total = 0
    largest = 0.0
    for name in left.tensors:
        a, b = left.read(name).float(), right.read(name).float()
        equal, total = equal + int((a == b).sum()), total + a.numel()
        scale = a.abs().maximum(b.abs()).clamp_min(1e-30)
        largest = max(largest, float(((a - b).abs() / scale).max()))
    return {"tensors": len(left.tensors), "numbers": total, "equal": equal / total, "largest_difference": largest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("experts", "unet", "optimum", "fill", "placement", "compare"))
    parser.add_argument("given", nargs="+")
    parser.add_argument("--small", action="store_true")
    asked = parser.parse_args()
    first, *rest = asked.given
    if asked.what == "experts":
        experts(Path(first), asked.small)
    elif asked.what == "unet":
        unet(Path(first), rest[0], rest[1], asked.small)
    elif asked.what == "optimum":
        optimum(Path(first), Path(rest[0]), rest[1])
    elif asked.what == "fill":
        fill(Path(first), Path(rest[0]), int(rest[1]))
    else:
        found = (
            placement(Path(first), rest[0]) if asked.what == "placement" else compare(Path(first), Path(rest[0]))
        )
        Path(rest[1]).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
