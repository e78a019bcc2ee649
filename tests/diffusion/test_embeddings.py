"""Textual inversion: vectors become rows of a token embedding, and tokens of a tokenizer."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_export.adapters.diffusion.vectors import vector_names, vectors_of
from lora_export.adapters.kind import AdapterFile
from lora_export.checkpoint.adapter_files import open_single_file
from lora_export.errors import LoraExportError
from lora_export.merging.pipelines.tokenizers import extended_files, open_tokenizer
from tests.diffusion import tiny

PROMPTS = ["a photo of the cat", "The  END, of 12 cats!", "ünïcode"]


def adapter_file(path: Path, shapes: Mapping[str, Sequence[int]]) -> AdapterFile:
    """Tensors of random numbers, no two vectors alike."""
    generator = torch.Generator().manual_seed(0)
    save_file({name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}, path)
    return AdapterFile(open_single_file(path)[0], {}, path)


# --- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({"bundle_emb.my style.string_to_param.*": (2, 8)}, [(("my style", "my style_1"), None, None)]),
        (
            {"bundle_emb.ohwx.clip_l": (1, 8), "bundle_emb.ohwx.clip_g": (1, 16)},
            [(("ohwx",), "clip_g", None), (("ohwx",), "clip_l", None)],
        ),
        ({"clip_l": (1, 8)}, [(("style",), "clip_l", None)]),
        ({"emb_params": (2, 8)}, [(("style", "style_1"), None, None)]),
        ({"<cat-toy>": (8,)}, [(("<cat-toy>",), None, None)]),
        ({"ohwx": (1, 8)}, [(("ohwx",), None, None)]),
        (
            {"text_encoders_0": (2, 8), "text_encoders_1": (2, 16)},
            [(("<s0>", "<s1>"), None, 0), (("<s0>", "<s1>"), None, 1)],
        ),
    ],
)
def test_vectors_of_every_file_have_tokens_and_encoder(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], expected: list[Any]
) -> None:
    file = adapter_file(tmp_path / "style.safetensors", shapes)
    names = vector_names(sorted(file.tensors))
    assert [(v.tokens, v.encoder, v.number) for v in vectors_of(file, names)] == expected


def test_vector_names_leave_weights_to_their_kinds() -> None:
    lora = ["lora_unet_conv_in.lora_down.weight", "lora_unet_conv_in.alpha"]
    assert vector_names([*lora, "bundle_emb.x.clip_l"]) == ("bundle_emb.x.clip_l",)
    assert vector_names(lora) == vector_names([]) == vector_names(["unet.conv_in.weight"]) == ()


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"bundle_emb.x.clip_l_out": (1, 8)}, "have no place in a token embedding"),
        ({"<x>": (1, 2, 8)}, "the shape is"),
        ({"bundle_emb. x.clip_l": (1, 8)}, "cannot be a token"),
    ],
)
def test_vectors_without_place_are_refused(tmp_path: Path, shapes: dict[str, tuple[int, ...]], said: str) -> None:
    file = adapter_file(tmp_path / "style.safetensors", shapes)
    with pytest.raises(LoraExportError, match=said):
        vectors_of(file, tuple(shapes))


# --- tokenizers --------------------------------------------------------------------------------------------


def tokenizer_folder(folder: Path, layout: str) -> Path:
    """CLIP's tokenizer as transformers 5 saves it (whole), as SD 1.5 has it (plain), and as SDXL has it (table)."""
    folder.mkdir(parents=True)
    vocabulary, merges = tiny._clip_vocabulary()
    if layout == "whole":
        tiny._clip_tokenizer().save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    if layout == "whole":
        return folder
    start, end = "<|startoftext|>", "<|endoftext|>"
    settings: dict[str, Any] = {
        "bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end, "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
    }  # fmt: skip
    if layout == "table":
        plain = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "special": True}
        settings["added_tokens_decoder"] = {str(vocabulary[t]): {"content": t, **plain} for t in (start, end)}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def load(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("layout", ["whole", "plain", "table"])
def test_extended_tokenizer_gives_next_ids_and_nothing_else_changes(tmp_path: Path, layout: str) -> None:
    folder = tokenizer_folder(tmp_path / "tokenizer", layout)
    before, opened = load(folder), open_tokenizer(folder)
    tokens = ["my style", "my style_1", "<toy>"]
    extended = tmp_path / "extended"
    shutil.copytree(folder, extended)
    for name, raw in extended_files(opened, tokens).items():
        (extended / name).write_bytes(raw)
    after, count = load(extended), len(before)
    assert len(opened.ids) == count and len(after) == count + 3
    for prompt in PROMPTS:
        assert after(prompt).input_ids == before(prompt).input_ids
    ids = after("the my style my style_1 <toy> cat").input_ids
    assert [i for i in ids if i >= count] == [count, count + 1, count + 2]
    assert [i for i in ids if i < count] == before("the cat").input_ids
    assert open_tokenizer(extended).ids["<toy>"] == count + 2 and opened.end == before.eos_token_id


def test_extended_tokenizer_can_be_extended_again(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path / "tokenizer", "plain")
    count = len(open_tokenizer(folder).ids)
    for at, token in enumerate(["<one>", "<two>"]):
        for name, raw in extended_files(open_tokenizer(folder), [token]).items():
            (folder / name).write_bytes(raw)
        assert load(folder)(token).input_ids[1:-1] == [count + at]


def test_tokenizer_with_holes_is_refused(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path / "tokenizer", "plain")
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({**vocabulary, "late": 10_000}))
    with pytest.raises(LoraExportError, match="without holes"):
        open_tokenizer(folder)


def test_tokenizer_of_sentencepiece_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(b"")
    with pytest.raises(LoraExportError, match=r"no tokenizer.json or vocab.json"):
        open_tokenizer(tmp_path)
