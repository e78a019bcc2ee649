"""How a model with one forward is called and traced: what it takes, which branch it takes, and what is replaced."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from lora_export.errors import ExportError
from lora_export.onnx_export.engines import trace_patches
from lora_export.onnx_export.engines.dynamo_passes import branches, mending
from lora_export.onnx_export.engines.dynamo_passes.traced_graph import TracedGraph
from lora_export.onnx_export.engines.parts import single
from lora_export.onnx_export.engines.parts.graph_part import GraphPart


class Model(torch.nn.Module):
    """What the engine asks of a model of transformers. run: its forward, by keyword."""

    name_or_path = ""

    def __init__(self, run: Callable[..., Any], **settings: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=False, **settings)
        self.forward = run


def _pooled(pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"logits": pixel_values.mean((2, 3)), "hidden_states": pixel_values}


def _fixed(pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> dict[str, torch.Tensor]:
    if pixel_values.shape[-1] != 48 and not interpolate_pos_encoding:
        raise ValueError("Input image size doesn't match model (48*48)")
    return {"logits": pixel_values.mean((2, 3))}


def _towers(input_ids: torch.Tensor, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"logits_per_image": pixel_values.mean((1, 2, 3))[:, None] * input_ids.sum(1)[None].float()}


def _page(input_ids: torch.Tensor, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"logits": input_ids.float() + pixel_values.mean((1, 2, 3))[:, None]}


def _drawn(input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"logits": input_ids + torch.randn(input_ids.shape)}


def _counted(input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"logits": torch.zeros(int(input_ids.sum().item()))}


def axes(part: GraphPart, name: str) -> list[Any]:
    shape, _, named = part.inputs[name]
    return [named.get(i, size) for i, size in enumerate(shape)]


def test_part_pictures_of_any_size_are_dynamic_and_only_the_tasks_outputs_are_kept() -> None:
    part = single.part(Model(_pooled, image_size=48), "image-classification")
    assert axes(part, "pixel_values") == ["batch_size", 3, "height", "width"]
    assert list(part.outputs) == ["logits"]
    assert part.fallback is not None and axes(part.fallback, "pixel_values") == ["batch_size", 3, 48, 48]


def test_part_pictures_of_one_size_have_that_of_the_configuration() -> None:
    part = single.part(Model(_fixed, image_size=48), "image-classification")
    assert axes(part, "pixel_values") == ["batch_size", 3, 48, 48]


def test_part_pictures_of_another_processor_are_interpolated(tmp_path: Any) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"height": 64, "width": 64}}')
    model = Model(_fixed, image_size=48)
    model.name_or_path = str(tmp_path)
    part = single.part(model, "image-classification")
    assert axes(part, "pixel_values") == ["batch_size", 3, "height", "width"]
    assert part.pictures == ((48, 48), (64, 64), (96, 96), (128, 128))


def test_part_two_towers_have_a_batch_each_and_a_page_has_one() -> None:
    towers = single.part(Model(_towers, image_size=48), "zero-shot-image-classification")
    assert (
        axes(towers, "input_ids")[0] == "text_batch_size" and axes(towers, "pixel_values")[0] == "image_batch_size"
    )
    page = single.part(Model(_page, image_size=48), "token-classification")
    assert axes(page, "input_ids")[0] == axes(page, "pixel_values")[0] == "batch_size"


def test_part_choices_are_an_axis() -> None:
    part = single.part(Model(_drawn_not), "multiple-choice")
    assert axes(part, "input_ids") == ["batch_size", "num_choices", "sequence_length"]


def _drawn_not(input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"logits": input_ids.sum(2).float()}


def test_part_tokenizer_without_a_mask_leaves_it_out(tmp_path: Any) -> None:
    def run(input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"logits": input_ids.float()}

    model = Model(run)
    assert list(single.part(model, "fill-mask").inputs) == ["input_ids", "attention_mask"]
    (tmp_path / "tokenizer_config.json").write_text('{"model_input_names": ["input_ids"]}')
    model.name_or_path = str(tmp_path)
    assert list(single.part(model, "fill-mask").inputs) == ["input_ids"]


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (_drawn, "draws random numbers in its forward .torch.randn."),
        (_counted, "depends on the values of its inputs"),
        (
            lambda input_ids: {"logits": input_ids.reshape(7, 7)},
            "no inputs are known that the forward of Model takes",
        ),
    ],
)
def test_part_what_no_graph_can_hold_is_refused_in_words(run: Callable[..., Any], words: str) -> None:
    with pytest.raises(ExportError, match=words):
        single.part(Model(run), "fill-mask")


def test_part_leaves_a_model_as_it_was() -> None:
    def run(pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        if pixel_values.shape[-1] <= model.window:
            model.window, model.shift = pixel_values.shape[-1], 0
        return {"logits": pixel_values.mean((2, 3)) + model.shift}

    model = Model(run, image_size=48)
    model.window, model.shift = 64, 32
    assert single.part(model, "image-classification").fallback is not None
    assert (model.window, model.shift) == (64, 32)


# --- branches ----------------------------------------------------------------------------------------------------


def _part(**settings: Any) -> GraphPart:
    pixels = ((2, 3, 96, 128), torch.float32, {0: "batch_size", 2: "height", 3: "width"})
    ids = ((2, 16), torch.int64, {0: "batch_size", 1: "sequence_length"})
    given = {"pixel_values": pixels} if "pictures" in settings else {"input_ids": ids}
    return GraphPart("m", "d", lambda *_: (), given, {}, **settings)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("min(L['values'][0].size()[2], L['values'][0].size()[3]) > 64", "height 48, width 96"),
        ("L['values'][0].size()[2] % 16 == 0", None),
        ("L['values'][0].size()[2] != 48", None),
        ("unknown(L)", "height 48, width 96"),
    ],
)
def test_broken_names_the_picture_that_takes_another_path(code: str, found: str | None) -> None:
    assert branches.broken([code], _part(pictures=((48, 96), (96, 192)))) == found


def test_broken_names_the_length_from_which_a_text_takes_another_path() -> None:
    code = "L['values'][0].size()[1] <= 704"
    assert branches.broken([code], _part(longest=512)) is None
    assert branches.broken([code], _part(longest=4096)) == "sequence_length 1021"


def test_noted_conditions_of_a_trace_tell_the_branch() -> None:
    class Branch(torch.nn.Module):
        def forward(self, *values: torch.Tensor) -> torch.Tensor:
            return values[0] * 2 if values[0].shape[1] > 8 else values[0]

    with branches.noted() as conditions:
        shapes = (({1: "sequence_length"},),)
        torch.onnx.export(Branch(), (torch.zeros(2, 16),), dynamo=True, verbose=False, dynamic_shapes=shapes)
    part = GraphPart("m", "d", lambda *_: (), _part(longest=64).inputs, {}, longest=64)
    assert branches.broken(conditions, part) == "sequence_length 3"


# --- replacements ------------------------------------------------------------------------------------------------


def test_applied_last_end_of_each_row_is_what_transformers_pools() -> None:
    model = type("BartForSequenceClassification", (), {})()
    model.config, model.modules = SimpleNamespace(is_encoder_decoder=True), lambda: iter(())
    states, ids = (
        torch.randn(3, 7, 4),
        torch.tensor([[2, 5, 5, 2, 5, 5, 5], [5, 2, 5, 5, 5, 5, 2], [2, 2, 5, 5, 5, 5, 5]]),
    )
    mask = ids == 2
    expected = states[mask, :].view(3, -1, 4)[:, -1, :]
    with trace_patches.applied(model):
        assert torch.unique_consecutive(mask.sum(1)).numel() == 1
        found = states[mask, :].view(3, -1, 4)[:, -1, :]
        assert (states[1:, 2] == states[1:3][:, 2]).all()  # other indices are as they were
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("size", "out"), [((7, 5), (3, 2)), ((3, 2), (6, 6)), ((8, 8), (4, 4))])
def test_pooled_to_any_size_is_pytorchs(size: tuple[int, int], out: tuple[int, int]) -> None:
    states = torch.randn(2, 3, *size, dtype=torch.float64)
    rows, columns = (trace_patches._shares(n, o, states) for n, o in zip(size, out, strict=True))
    expected = torch.nn.functional.adaptive_avg_pool2d(states, out)
    assert torch.allclose(rows @ states @ columns.T, expected, rtol=1e-12)


def test_int_of_a_model_is_pythons_int() -> None:
    number = trace_patches._NUMBERS["int"]
    assert number("7") == 7 and number(2.9) == 2 and number("11", 2) == 3
    assert isinstance(7, number) and not isinstance(7.0, number)


# --- mending -----------------------------------------------------------------------------------------------------


def test_split_batch_transposes_beside_a_matrix_makes_the_product_run() -> None:
    x = ir.Value(name="x", shape=ir.Shape((4, 2, 3)), type=ir.TensorType(ir.DataType.FLOAT))
    w = ir.Value(name="w", shape=ir.Shape((3, 5)), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("FusedMatMul", [x, w], {"transBatchA": 1}, domain="com.microsoft", num_outputs=1)
    node.outputs[0].name, node.outputs[0].dtype = "y", ir.DataType.FLOAT
    opsets = {"": 20, "com.microsoft": 1}
    graph = ir.Graph([x, w], [node.outputs[0]], nodes=[node], opset_imports=opsets, name="g")
    mending.split_batch_transposes(TracedGraph(ir.Model(graph, ir_version=10), {}))
    session = ort.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString())
    a, b = np.random.default_rng(0).random((4, 2, 3), np.float32), np.ones((3, 5), np.float32)
    assert np.allclose(session.run(None, {"x": a, "w": b})[0], a.transpose(1, 0, 2) @ b, rtol=1e-5)
