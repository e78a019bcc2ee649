"""What a graph computes from the grids of pictures, against transformers' own loops over them."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import transformers
from transformers import vision_utils

from lora_export.graph_runs.vision_language import placed
from lora_export.onnx_export.engines.parts import patches, pictures
from lora_export.onnx_export.engines.parts.graph_part import NotTraceable
from lora_export.packages.genai_vision import put_in
from tests.architectures.tiny import small

MERGE, PATCH, WINDOW = 2, 4, 24
# Windows of 3 × 3 blocks, cut off at both edges; a video of two frames; pictures of one block.
GRIDS = torch.tensor([[1, 4, 6], [1, 10, 14], [2, 8, 4], [1, 2, 2]])
COUNT = int(GRIDS.prod(1).sum())


@pytest.fixture
def known() -> dict[str, Any]:
    tower = SimpleNamespace(
        spatial_merge_size=MERGE, fullatt_block_indexes=[1], window_size=WINDOW, patch_size=PATCH,
        num_grid_per_side=6, interpolation_mode="bilinear", interpolation_align_corners=True,
    )  # fmt: skip
    return patches.known(tower, torch.zeros(COUNT, 1), GRIDS)


def test_places_of_patches_are_those_of_transformers(known: dict[str, Any]) -> None:
    torch.testing.assert_close(known["position_ids"], vision_utils.get_vision_position_ids(GRIDS, MERGE))


def test_patches_see_their_frame_as_in_transformers(known: dict[str, Any]) -> None:
    ends = vision_utils.get_vision_cu_seqlens(GRIDS)
    own = torch.bucketize(torch.arange(COUNT), ends, right=True)
    assert torch.equal(_together(known["cu_seqlens"]), _together(own))


def test_patches_see_their_window_as_in_transformers(known: dict[str, Any]) -> None:
    order, ends = vision_utils.get_vision_window_index(GRIDS, MERGE, WINDOW, PATCH)
    block = torch.bucketize(torch.arange(COUNT), ends, right=True)  # of the patches in transformers' order
    own = torch.empty(COUNT, dtype=torch.long)
    own[(order[:, None] * MERGE**2 + torch.arange(MERGE**2)).flatten()] = block
    assert torch.equal(_together(known["cu_window_seqlens"]), _together(own))
    assert torch.equal(known["window_index"], torch.arange(COUNT // MERGE**2))


def test_learned_positions_are_resampled_as_in_transformers(known: dict[str, Any]) -> None:
    indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
        GRIDS, 6, mode="bilinear", align_corners=True, spatial_merge_size=MERGE
    )
    assert torch.equal(known["interp_indices"], indices)
    torch.testing.assert_close(known["interp_weights"], weights)


def _together(piece: torch.Tensor) -> torch.Tensor:
    return piece[:, None] == piece[None]


def test_positions_of_a_text_with_pictures_are_those_of_transformers() -> None:
    config = small(transformers.Qwen2_5_VLConfig)
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLModel(config)
    grids = torch.tensor([[1, 4, 6], [1, 6, 2]])
    image = config.image_token_id
    ids = torch.tensor([5, 6, *[image] * 6, 7, *[image] * 3, 8, 9])
    expected, _ = model.get_rope_index(
        ids[None], mm_token_type_ids=(ids == image).long()[None], image_grid_thw=grids
    )
    found = placed(ids.numpy(), {"image_grid_thw": grids.numpy()}, image, config.vision_config.spatial_merge_size)
    assert found.tolist() == expected[:, 0].tolist()


def test_pictures_that_are_cut_by_their_sizes_are_refused() -> None:
    with torch.device("meta"):
        model = transformers.LlavaNextForConditionalGeneration(small(transformers.LlavaNextConfig))
    with pytest.raises(NotTraceable, match="original size"):
        pictures.inputs(model)


@pytest.mark.parametrize("count", [3, 0])
def test_features_go_where_the_placeholders_are(count: int) -> None:
    """Fewer features than placeholders, as when a text is continued by one, leave the others."""
    table = np.arange(20, dtype=np.float32).reshape(10, 2)
    ids = ir.Value(name="input_ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["b", "l"]))
    weight = ir.Value(name="table", const_value=ir.tensor(table, name="table"))
    node = ir.node("Gather", [weight, ids], num_outputs=1)
    rows = node.outputs[0]
    rows.name, rows.type, rows.shape = "inputs_embeds", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["b", "l", 2])
    graph = ir.Graph([ids], [rows], nodes=[node], initializers=[weight], opset_imports={"": 20}, name="embedding")
    model = ir.Model(graph, ir_version=10)
    put_in(model, placeholder=7)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    given = np.array([[1, 7, 7, 2], [7, 3, 4, 7]])
    features = -np.ones((count, 2), np.float32) * np.arange(1, count + 1, dtype=np.float32)[:, None]
    (found,) = session.run(None, {"input_ids": given, "image_features": features})
    expected = table[given]
    for place, row in zip(((0, 1), (0, 2), (1, 0)), features, strict=False):
        expected[place] = row
    np.testing.assert_array_equal(found, expected)
