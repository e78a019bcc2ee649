"""Folders of sentence-transformers, and their embeddings by the definition: one row at a time, without padding."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from safetensors.torch import load_file, save_file

OLD, NEW = "sentence_transformers.models", "sentence_transformers.sentence_transformer.modules"
ACTIVATIONS = {"Tanh": torch.tanh, "Identity": lambda x: x, "GELU": torch.nn.functional.gelu}


def save_modules(
    folder: Path,
    width: int,
    modes: Sequence[str] = ("mean_tokens",),
    dense: Sequence[tuple[int, str]] = (),
    normalize: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """modules.json and its folders. modes: as the old keys name them; dense: output sizes and activations."""
    torch.manual_seed(3)
    entries = [("Transformer", "")]
    pooling: dict[str, Any] = {"word_embedding_dimension": width, **(settings or {})}
    _write(folder / "1_Pooling", pooling | {f"pooling_mode_{mode}": True for mode in modes})
    entries.append(("Pooling", "1_Pooling"))
    inputs = width * len(modes)
    for outputs, activation in dense:
        path = f"{len(entries)}_Dense"
        named = {"in_features": inputs, "out_features": outputs, "bias": activation != "Identity"}
        _write(folder / path, named | {"activation_function": f"torch.nn.modules.activation.{activation}"})
        weights = {"linear.weight": torch.randn(outputs, inputs) / inputs**0.5}
        weights |= {"linear.bias": torch.randn(outputs)} if named["bias"] else {}
        save_file(weights, folder / path / "model.safetensors")
        entries.append(("Dense", path))
        inputs = outputs
    if normalize:
        entries.append(("Normalize", f"{len(entries)}_Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"{OLD}.{kind}"} for i, (kind, path) in enumerate(entries)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    prompts = {"prompts": {"query": "query: "}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 32, "do_lower_case": false}')


def _write(folder: Path, settings: Mapping[str, Any]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))


def pooled(states: torch.Tensor, mode: str) -> torch.Tensor:
    """states: (length, width), without padding."""
    count = len(states)
    positions = torch.arange(1, count + 1, dtype=states.dtype)
    return {
        "cls_token": lambda: states[0],
        "max_tokens": lambda: states.amax(0),
        "mean_tokens": lambda: states.mean(0),
        "mean_sqrt_len_tokens": lambda: states.sum(0) / count**0.5,
        "weightedmean_tokens": lambda: (states * positions[:, None]).sum(0) / positions.sum(),
        "lasttoken": lambda: states[-1],
    }[mode]()


@torch.no_grad()
def embedding(folder: Path, states: torch.Tensor) -> torch.Tensor:
    """Of one row: what modules.json makes of its states (length, width)."""
    value = states.double()
    for module in json.loads((folder / "modules.json").read_text())[1:]:
        home, kind = folder / module["path"], module["type"].rpartition(".")[2]
        settings = json.loads((home / "config.json").read_text()) if (home / "config.json").is_file() else {}
        if kind == "Pooling":
            order = (
                "cls_token",
                "max_tokens",
                "mean_tokens",
                "mean_sqrt_len_tokens",
                "weightedmean_tokens",
                "lasttoken",
            )
            value = torch.cat([pooled(value, m) for m in order if settings.get(f"pooling_mode_{m}")])
        elif kind == "Dense":
            weights = load_file(home / "model.safetensors")
            linear = weights["linear.weight"].double() @ value + weights.get("linear.bias", torch.zeros(1)).double()
            value = ACTIVATIONS[settings["activation_function"].rpartition(".")[2]](linear)
        else:
            value = value / value.norm()
    return value.float()


def worst(graph: Path, folder: Path, model: Any, sides: Sequence[str] = ("right",)) -> float:
    """The largest difference of `sentence_embedding` from the definition, relative, over lengths and paddings.

    model: takes ids (1, length) and returns states (1, length, width), in PyTorch.
    """
    return max(_differences(graph, folder, model, sides))


@torch.no_grad()
def _differences(graph: Path, folder: Path, model: Any, sides: Sequence[str]) -> Iterator[float]:
    session = ort.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    names = {i.name for i in session.get_inputs()}
    for lengths in ([7], [3, 11, 1], [16, 2]):
        rows = [torch.randint(4, 100, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
        wanted = torch.stack([embedding(folder, model(input_ids=r[None]).last_hidden_state[0]) for r in rows])
        for side in sides:
            feeds = {k: v for k, v in padded(rows, side).items() if k in names}
            (found,) = session.run(["sentence_embedding"], feeds)
            yield float(np.abs(found - wanted.numpy()).max() / wanted.abs().max())


def padded(rows: Sequence[torch.Tensor], side: str) -> dict[str, Any]:
    longest = max(map(len, rows))
    fill = [(longest - len(r), 0) if side == "left" else (0, longest - len(r)) for r in rows]
    ids = torch.stack([torch.nn.functional.pad(r, f, value=3) for r, f in zip(rows, fill, strict=True)])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(r), f) for r, f in zip(rows, fill, strict=True)])
    return {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "token_type_ids": np.zeros_like(ids.numpy())}
