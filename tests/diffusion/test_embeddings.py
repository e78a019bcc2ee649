"""Textual inversion: vectors become rows of a token embedding, and tokens of a tokenizer."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_export.adapters.diffusion.vectors import vector_names, vectors_of
from lora_export.adapters.kind import AdapterFile
from lora_export.checkpoint.adapter_files import open_single_file
from lora_export.contracts import AdapterChoice, MergeOptions, MergeResult, VerifyOptions
from lora_export.errors import LoraExportError
from lora_export.merging import CERTIFICATE
from lora_export.merging.pipelines.merging import merge_pipeline
from lora_export.merging.pipelines.tokenizers import extended_files, open_tokenizer
from lora_export.merging.pipelines.verifying import verify_pipeline
from lora_export.progress import Silent
from tests.diffusion import tiny
from tests.diffusion.made import UNET, write_component

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


# --- merged pipelines --------------------------------------------------------------------------------------


WIDTHS = {"text_encoder": 32, "text_encoder_2": 48}
EMBEDDING = "text_model.embeddings.token_embedding.weight"
LORA = {"lora_unet_conv_in.lora_down.weight": (2, 4, 3, 3), "lora_unet_conv_in.lora_up.weight": (8, 2, 1, 1)}


def text_encoder(folder: Path, width: int, **more: Any) -> Path:
    import transformers

    vocabulary = tiny._clip_vocabulary()[0]
    end = vocabulary["<|endoftext|>"]
    config = transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=64, num_attention_heads=4, num_hidden_layers=1, projection_dim=32,
        vocab_size=len(vocabulary), **{"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end, **more},
    )  # fmt: skip
    model = transformers.CLIPTextModel(config)
    tiny.randomize(model, width).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def two_encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of a UNet and two CLIPs of different widths, the second with the legacy eos_token_id."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_component(folder / "unet", "UNet2DConditionModel", UNET, in_channels=4)
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    for number, layout in (("", "plain"), ("_2", "table")):
        legacy = {"eos_token_id": 2} if number else {}
        text_encoder(folder / f"text_encoder{number}", WIDTHS[f"text_encoder{number}"], **legacy)
        tokenizer_folder(folder / f"tokenizer{number}", layout)
        index[f"text_encoder{number}"] = ["transformers", "CLIPTextModel"]
        index[f"tokenizer{number}"] = ["transformers", "CLIPTokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def merged(base: Path, out: Path, *files: AdapterFile, weight: float = 1.0, **options: Any) -> MergeResult:
    choices = [AdapterChoice(f.where, weight) for f in files]
    return merge_pipeline(base, choices, out, MergeOptions(**options), Silent())


def table_of(pipeline: Path, encoder: str) -> torch.Tensor:
    name, tensors = EMBEDDING, load_file(pipeline / encoder / "model.safetensors")
    return tensors[name if name in tensors else name.removeprefix("text_model.")]


def test_bundled_vectors_become_rows_and_tokens_of_both_encoders(two_encoders: Path, tmp_path: Path) -> None:
    shapes = {**LORA, "bundle_emb.ohwx.clip_l": (2, 32), "bundle_emb.ohwx.clip_g": (2, 48)}
    file = adapter_file(tmp_path / "style.safetensors", shapes)
    result = merged(two_encoders, tmp_path / "out", file, weight=0.5)
    vectors, count = load_file(file.where), 520
    for encoder, key in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
        before, after = table_of(two_encoders, encoder), table_of(tmp_path / "out", encoder)
        assert after.shape == (count + 2, WIDTHS[encoder]) and torch.equal(after[:count], before)
        assert torch.equal(after[count:], vectors[f"bundle_emb.ohwx.{key}"])
        assert json.loads((tmp_path / "out" / encoder / "config.json").read_text())["vocab_size"] == count + 2
        tokenizer = load(tmp_path / "out" / encoder.replace("text_encoder", "tokenizer"))
        assert tokenizer("ohwx ohwx_1").input_ids[1:-1] == [count, count + 1]
    certificate = json.loads((tmp_path / "out" / CERTIFICATE).read_text())
    assert certificate["tokens"]["text_encoder_2"] == {"ohwx": count, "ohwx_1": count + 1}
    assert any("know the tokens ohwx, ohwx_1" in w for w in result.warnings)
    checked = verify_pipeline(
        tmp_path / "out", two_encoders, [AdapterChoice(file.where, 0.5)], VerifyOptions(), Silent()
    )
    assert checked.verified, [c for c in checked.checks if not c.passed]


def test_verify_finds_changed_tokenizer(two_encoders: Path, tmp_path: Path) -> None:
    file = adapter_file(tmp_path / "<x>.safetensors", {"clip_l": (1, 32)})
    merged(two_encoders, tmp_path / "out", file)
    path = tmp_path / "out" / "tokenizer" / "added_tokens.json"
    path.write_text(path.read_text().replace("520", "521"))
    checked = verify_pipeline(
        tmp_path / "out", two_encoders, [AdapterChoice(file.where)], VerifyOptions(), Silent()
    )
    assert {c.name for c in checked.checks if not c.passed} >= {"files"}


def test_merged_encoder_ends_text_at_its_end_and_not_at_new_token(two_encoders: Path, tmp_path: Path) -> None:
    import transformers

    file = adapter_file(tmp_path / "<x>.safetensors", {"clip_g": (1, 48)})
    result = merged(two_encoders, tmp_path / "out", file)
    assert any("eos_token_id becomes 519" in w for w in result.warnings)
    model = transformers.CLIPTextModel.from_pretrained(tmp_path / "out" / "text_encoder_2")
    ids = load(tmp_path / "out" / "tokenizer_2")("a <x> cat", return_tensors="pt").input_ids
    with torch.no_grad():
        made = model(ids)
    assert 520 in ids and torch.equal(made.pooler_output[0], made.last_hidden_state[0, -1])


def test_tokens_of_second_adapter_follow_those_of_first(two_encoders: Path, tmp_path: Path) -> None:
    files = [adapter_file(tmp_path / f"<{n}>.safetensors", {"clip_l": (2, 32)}) for n in ("one", "two")]
    merged(two_encoders, tmp_path / "out", *files)
    assert len(table_of(tmp_path / "out", "text_encoder")) == 524
    assert load(tmp_path / "out" / "tokenizer")("<two> <one>").input_ids[1:-1] == [522, 520]


@pytest.mark.parametrize(
    ("name", "shapes", "more", "said"),
    [
        ("<x>", {"clip_l": (1, 48)}, {}, "no such encoder is that wide"),
        ("<x>", {"emb_params": (1, 40)}, {}, "no such encoder is that wide"),
        ("the</w>", {"clip_l": (1, 32)}, {}, "has the token 'the</w>' already"),
        ("<x>", {"clip_l": (1, 32)}, {"weight": 0.5}, "vector of textual inversion is not a delta"),
        ("<x>", {**LORA, "bundle_emb.<x>.clip_l": (1, 32)}, {"combine": "linear"}, "are no deltas"),
    ],
)
def test_vectors_that_do_not_fit_are_refused_and_nothing_is_written(
    two_encoders: Path, tmp_path: Path, name: str, shapes: dict[str, Any], more: dict[str, Any], said: str
) -> None:
    file_name = name.replace("/", "_")
    keys = {f"bundle_emb.{name}.{k}" if "/" in name else k: v for k, v in shapes.items()}
    file = adapter_file(tmp_path / f"{file_name}.safetensors", keys)
    with pytest.raises(LoraExportError, match=said):
        merged(two_encoders, tmp_path / "out", file, **more)
    assert not (tmp_path / "out").exists()


def test_vectors_for_unet_alone_are_refused(two_encoders: Path, tmp_path: Path) -> None:
    file = adapter_file(tmp_path / "style.safetensors", {**LORA, "bundle_emb.x.clip_l": (1, 32)})
    with pytest.raises(LoraExportError, match="the base has no text encoder"):
        merged(two_encoders / "unet", tmp_path / "out", file)


def test_skipped_encoder_gets_no_tokens(two_encoders: Path, tmp_path: Path) -> None:
    file = adapter_file(tmp_path / "style.safetensors", {**LORA, "bundle_emb.<x>.clip_l": (1, 32)})
    merged(two_encoders, tmp_path / "out", file, skip=("text_encoder",))
    assert (
        len(load(tmp_path / "out" / "tokenizer")) == 520 and len(table_of(tmp_path / "out", "text_encoder")) == 520
    )
    assert json.loads((tmp_path / "out" / CERTIFICATE).read_text())["tokens"] == {}
