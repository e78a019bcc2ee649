"""Models that see and write."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lora_export.contracts import ExportResult
from tests.export_matrix.models import Row
from tests.export_matrix.seq2seq import WRITES
from tests.export_matrix.seq2seq_runs import agreement
from tests.onnx_export.conftest import VOCABULARY
from tests.onnx_export.runs import Arrays, session

Pictures = Callable[[Any, Sequence[tuple[int, int]]], Mapping[str, torch.Tensor]]
# The sizes of the pictures of each row of a batch, as multiples of the smallest that the model takes.
CASES: Sequence[Sequence[Sequence[tuple[int, int]]]] = (
    [[(1, 1)], [(1, 1)]],
    [[], [], []],
    [[(1, 1), (1, 1)]],
    [[], [(1, 1)]],
)
SIZED: Sequence[Sequence[Sequence[tuple[int, int]]]] = (*CASES, [[(2, 3)]], [[(3, 1), (1, 2)], [(4, 3)]])
STEPS = (1, 3)  # tokens after the pictures that the decoder gets in later steps


@dataclass(frozen=True)
class Case:
    """ids, mask: (rows, length), padded on the left; kinds: 1 where a picture is; seen: what the model reads of the
    pictures, nothing without any."""

    ids: torch.Tensor
    mask: torch.Tensor
    kinds: torch.Tensor
    seen: Mapping[str, torch.Tensor]


def pixels(model: Any, sizes: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Pictures of the one size that the model knows."""
    side = model.config.vision_config.image_size
    side = side[0] if isinstance(side, list) else side
    generator = torch.Generator().manual_seed(len(sizes))
    return {"pixel_values": torch.rand(len(sizes), 3, side, side, generator=generator) * 2 - 1}


def tiles(model: Any, sizes: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
    """One picture a row, the lower part of some is padding; the last row's second tile is."""
    side = model.config.vision_config.image_size
    generator = torch.Generator().manual_seed(len(sizes))
    pixels = torch.rand(1, len(sizes), 3, side, side, generator=generator) * 2 - 1
    mask = torch.ones(1, len(sizes), side, side, dtype=torch.bool)
    mask[0, -1, side // 2 :] = False
    pixels *= mask[:, :, None]
    if len(sizes) > 1:
        pixels = torch.cat([pixels, torch.zeros_like(pixels[:, :1])], 1)
        mask = torch.cat([mask, torch.zeros_like(mask[:, :1])], 1)
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


def sized(model: Any, sizes: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
    """One picture of any size."""
    ((height, width),) = sizes
    cell = model.config.vision_config.patch_size * model.config.spatial_merge_size
    pixels = torch.rand(1, 3, height * 2 * cell, width * cell, generator=torch.Generator().manual_seed(height))
    return {"pixel_values": pixels * 2 - 1, "image_sizes": torch.tensor([pixels.shape[2:]])}


def grids(model: Any, sizes: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Pictures of several sizes, whose patches are in one row."""
    vision = model.config.vision_config
    merge = vision.spatial_merge_size
    thw = torch.tensor([[1, 2 * merge * height, 2 * merge * width] for height, width in sizes])
    values = vision.temporal_patch_size * 3 * vision.patch_size**2
    generator = torch.Generator().manual_seed(len(sizes))
    pixels = torch.rand(int(thw.prod(1).sum()), values, generator=generator) * 2 - 1
    return {"pixel_values": pixels, "image_grid_thw": thw}


@torch.no_grad()
def seeing(result: ExportResult, model: Any, pictures: Pictures = pixels, cases: Any = CASES) -> float:
    """All three graphs on other pictures and texts than were traced, the cache in several steps."""
    assert result.kind == "vision-language"
    return max(
        float(np.abs(wanted - found).max() / np.abs(wanted).max())
        for sizes in cases
        for wanted, found in _compared(result, model, _case(model, pictures, sizes))
    )


def _case(model: Any, pictures: Pictures, sizes: Sequence[Sequence[tuple[int, int]]]) -> Case:
    config = model.config
    image = config.image_token_id
    rows, kinds = [], []
    generator = torch.Generator().manual_seed(sum(map(len, sizes)))
    for row, own in enumerate(sizes):
        ids, kind = [_words(config, 2 + row, generator)], [torch.zeros(2 + row)]
        for size in own:
            with_one = pictures(model, [size])
            count = _count(model, with_one)
            ids += [_start(config), torch.full((count,), image), _words(config, 4, generator)]
            kind += [torch.zeros(len(_start(config))), torch.ones(count), torch.zeros(4)]
        ids.append(_words(config, 3 + 2 * row, generator))
        kind.append(torch.zeros(3 + 2 * row))
        rows.append(torch.cat(ids).long())
        kinds.append(torch.cat(kind).long())
    longest = max(map(len, rows))
    left = [longest - len(row) for row in rows]
    padded = [torch.stack([torch.nn.functional.pad(x, (n, 0)) for x, n in zip(all_, left, strict=True)]) for all_ in
              (rows, kinds, [torch.ones_like(row) for row in rows])]  # fmt: skip
    every = [size for own in sizes for size in own]
    return Case(padded[0], padded[2], padded[1], pictures(model, every) if every else {})


def _words(config: Any, count: int, generator: torch.Generator) -> torch.Tensor:
    """Random ids that mean nothing special."""
    special = {getattr(config, n, None) for n in ("image_token_id", "video_token_id", "vision_start_token_id")}
    known = torch.tensor([i for i in range(4, VOCABULARY) if i not in special])
    return known[torch.randint(len(known), (count,), generator=generator)]


def _start(config: Any) -> torch.Tensor:
    start = getattr(config, "vision_start_token_id", None)
    return torch.tensor([] if start is None else [start])


def _count(model: Any, seen: Mapping[str, torch.Tensor]) -> int:
    made = model.get_image_features(**seen, return_dict=True).pooler_output
    return sum(part.reshape(-1, part.shape[-1]).shape[0] for part in made)


def _compared(result: ExportResult, model: Any, case: Case) -> Iterator[tuple[Any, Any]]:
    vision, embedding, decoder = (session(result.output / name) for name in result.graphs)
    given, positions = _reference_inputs(model, case)
    wanted = model(**given).logits.float().numpy()
    rows = _run(embedding, {"input_ids": case.ids})["inputs_embeds"]
    if case.seen:
        rows[case.kinds.bool().numpy()] = _run(vision, case.seen)["image_features"]
    past, at, length = _empty(decoder, len(rows)), 0, rows.shape[1]
    for step in (length - sum(STEPS), *STEPS):
        now = slice(at, at + step)
        found = _run(decoder, {
            "inputs_embeds": rows[:, now], "attention_mask": case.mask[:, : at + step],
            "position_ids": positions[..., now], **past,
        })  # fmt: skip
        past = {_read_as(name): value for name, value in found.items() if name != "logits"}
        at += step
        keep = case.mask[:, now, None].numpy()
        yield wanted[:, now] * keep, found["logits"] * keep


def _read_as(name: str) -> str:
    for part in ("conv", "recurrent", "ssm"):
        name = name.replace(f"present_{part}", f"past_{part}")
    return name.replace("present.", "past_key_values.")


def _reference_inputs(model: Any, case: Case) -> tuple[dict[str, Any], torch.Tensor]:
    given: dict[str, Any] = {"input_ids": case.ids, "attention_mask": case.mask, **case.seen}
    names = inspect.signature(model.forward).parameters
    positions = (case.mask.cumsum(1) - 1).clamp(min=0)
    if "token_type_ids" in names:
        given["token_type_ids"] = case.kinds
    if model.config.model_type == "paligemma":  # 0: the prompt, which sees all of itself
        given["token_type_ids"] = (
            (torch.arange(case.ids.shape[1]) >= case.ids.shape[1] - sum(STEPS)).long().expand(case.ids.shape)
        )
    if hasattr(model.model, "get_rope_index"):
        grids = {k: v for k, v in case.seen.items() if k.endswith("grid_thw")}
        kinds = {"mm_token_type_ids": case.kinds}
        positions, _ = model.model.get_rope_index(case.ids, **kinds, **grids, attention_mask=case.mask)
        given |= kinds
    return given | {"position_ids": positions}, positions


def _run(runs: Any, feeds: Mapping[str, Any]) -> Arrays:
    types = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(bool)": np.bool_}
    feeds = {"grid_thw": feeds.get("image_grid_thw"), **feeds}
    given = {i.name: np.asarray(feeds[i.name]).astype(types[i.type]) for i in runs.get_inputs()}
    return dict(zip([o.name for o in runs.get_outputs()], runs.run(None, given), strict=True))


def _empty(runs: Any, rows: int) -> Arrays:
    """Caches of no tokens; states of a fixed size are zeros."""
    return {
        i.name: np.zeros((rows, *(d if isinstance(d, int) else 0 for d in i.shape[1:])), np.float32)
        for i in runs.get_inputs()
        if i.name.startswith("past")
    }


_MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 2, 2]}
_QWEN2_VISION = {"depth": 2, "embed_dim": 48, "hidden_size": 48, "num_heads": 4, "mlp_ratio": 2}
_QWEN2_5_VISION = {"window_size": 24, "fullatt_block_indexes": [1], "depth": 3}
_QWEN3_VISION = {"depth": 3, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 36}
_QWEN3_5_TEXT = {
    "layer_types": ["linear_attention", "full_attention"], "head_dim": 16, "linear_key_head_dim": 8,
    "linear_value_head_dim": 12, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "rope_parameters": {**_MROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
}  # fmt: skip
_GEMMA = {"mm_tokens_per_image": 4, "text_config": {"layer_types": ["sliding_attention", "full_attention"]}}

packed = functools.partial(seeing, pictures=grids, cases=SIZED)
tiled = functools.partial(seeing, pictures=tiles)
ONE: Sequence[Sequence[Sequence[tuple[int, int]]]] = (
    [[(1, 1)]], [[], [(2, 3)]], [[], []], [[(3, 1)]],
)  # fmt: skip
ROWS = (
    Row(
        "Qwen2_5_VLForConditionalGeneration",
        {"text_config": {"rope_parameters": _MROPE}, "vision_config": _QWEN2_5_VISION},
        packed,
    ),
    Row("Gemma3ForConditionalGeneration", _GEMMA, seeing),
    Row("LlavaForConditionalGeneration", compare=seeing),
    Row("VisionEncoderDecoderModel", WRITES, agreement),
    Row(
        "Qwen3_5ForConditionalGeneration",
        {"text_config": _QWEN3_5_TEXT, "vision_config": {"depth": 2, "num_position_embeddings": 36}},
        packed,
    ),
    Row("SmolVLMForConditionalGeneration", compare=tiled),
    Row("Idefics3ForConditionalGeneration", compare=tiled),
    Row(
        "Qwen2VLForConditionalGeneration",
        {"text_config": {"rope_parameters": _MROPE}, "vision_config": _QWEN2_VISION},
        packed,
    ),
    Row(
        "Qwen3VLForConditionalGeneration",
        {"text_config": {"rope_parameters": _MROPE}, "vision_config": _QWEN3_VISION},
        packed,
    ),
    Row("PaliGemmaForConditionalGeneration", compare=seeing),
    Row("InternVLForConditionalGeneration", {"downsample_ratio": 0.5}, seeing),
    Row(
        "Mistral3ForConditionalGeneration",
        {"spatial_merge_size": 2, "vision_config": {"image_size": 32, "head_dim": 12}},
        functools.partial(seeing, pictures=sized, cases=ONE),
    ),
)
