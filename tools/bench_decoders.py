"""Generic graphs of decoders beside Optimum's export of the same models: their nodes, and how long they take.

    LORA_EXPORT_CACHE=… python tools/bench_decoders.py                 # all shapes
    python tools/bench_decoders.py llama qwen3 --rounds 41

Optimum exports in an environment of its own (tests/consumers/environments.py). Both graphs run in this process, in
turn, with one thread: a prompt of 128, one token behind 128 and behind 512, and four rows of one token. The weights
are random, some 30M parameters; the widths are those of small models.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

_SIZES = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8,
    "vocab_size": 16_000, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_GPT2 = {"n_embd": 512, "n_layer": 6, "n_head": 8, "vocab_size": 16_000, "bos_token_id": 1, "eos_token_id": 2}
SHAPES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", _GPT2),
    "llama": ("LlamaForCausalLM", {**_SIZES, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3ForCausalLM", {**_SIZES, "num_key_value_heads": 2, "head_dim": 64}),
    "olmo2": ("Olmo2ForCausalLM", {**_SIZES, "num_key_value_heads": 8}),
    "falcon": ("FalconForCausalLM", {**_SIZES, "multi_query": True, "new_decoder_architecture": False}),
    "stablelm": ("StableLmForCausalLM", {**_SIZES, "num_key_value_heads": 8}),
}
RUNS = ((1, 128, 0), (1, 1, 128), (1, 1, 512), (4, 1, 128))  # rows, tokens, tokens before


def save(name: str, folder: Path) -> None:
    import torch
    import transformers

    cls, settings = SHAPES[name]
    made = getattr(transformers, cls)
    torch.manual_seed(0)
    made(made.config_class(**settings)).save_pretrained(folder)


def export_both(model: Path, ours: Path, theirs: Path) -> None:
    from tests.consumers.environments import optimum_python

    program = (
        "from optimum.exporters.onnx import main_export; "
        f"main_export({str(model)!r}, output={str(theirs)!r}, task='text-generation-with-past')"
    )
    subprocess.run([optimum_python(), "-c", program], check=True, capture_output=True, cwd=tempfile.gettempdir())
    command = [sys.executable, "-m", "lora_export", "export", "-m", model, "-o", ours, "--engine", "dynamo"]
    subprocess.run([*map(str, command), "--precision", "fp32", "-q"], check=True)


def nodes(folder: Path) -> int:
    return len(list(ir.load(folder / "model.onnx").graph))


def session(folder: Path) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def feed(runs: Any, rows: int, tokens: int, past: int) -> dict[str, Any]:
    draw, made = np.random.default_rng(0), {}
    for given in runs.get_inputs():
        if given.name == "input_ids":
            array = draw.integers(4, 100, (rows, tokens))
        elif given.name == "attention_mask":
            array = np.ones((rows, past + tokens), np.int64)
        elif given.name == "position_ids":
            array = np.tile(np.arange(past, past + tokens), (rows, 1))
        else:
            shape = [rows, *(past if isinstance(d, str) else d for d in given.shape[1:])]
            array = draw.standard_normal(shape).astype(np.float32)
        made[given.name] = ort.OrtValue.ortvalue_from_numpy(array)
    return made


def milliseconds(arms: Mapping[str, Any], size: tuple[int, int, int], rounds: int) -> dict[str, float]:
    """Medians of runs in turn."""
    feeds = {name: feed(runs, *size) for name, runs in arms.items()}
    outputs = {name: [o.name for o in runs.get_outputs()] for name, runs in arms.items()}
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(rounds):
        for name in list(arms) if i % 2 else list(arms)[::-1]:
            started = time.perf_counter()
            arms[name].run_with_ort_values(outputs[name], feeds[name])
            taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[1:]) * 1e3 for name, values in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=21)
    asked = parser.parse_args()
    for name in asked.names:
        folder = Path(tempfile.mkdtemp())
        try:
            model, ours, theirs = (folder / part for part in ("model", "ours", "optimum"))
            save(name, model)
            export_both(model, ours, theirs)
            print(f"{name}: {nodes(ours)} nodes of {nodes(theirs)}, {nodes(ours) / nodes(theirs):.2f}", flush=True)
            arms = {"ours": session(ours), "optimum": session(theirs)}
            for size in RUNS:
                taken = milliseconds(arms, size, asked.rounds)
                ratio = taken["ours"] / taken["optimum"]
                what = "{} x {} behind {}".format(*size)
                print(f"  {what}: {taken['ours']:.1f} ms, {taken['optimum']:.1f} ms, {ratio:.2f}", flush=True)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
