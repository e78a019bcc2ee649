"""The benchmark of a pipeline: what a denoiser is fed, which arms there are, what is said of the graphs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from lora_export.benchmarking.buffers import Shape
from lora_export.choices import GRIDS, Shapes
from lora_export.commands.main import cli
from lora_export.contracts import BenchmarkOptions, Component, Pipeline
from lora_export.errors import InputError
from lora_export.graph_runs.denoiser import as_arguments, is_denoiser, step_feed
from lora_export.graph_runs.signature import GraphValue, Signature
from lora_export.progress import Silent
from lora_export.report import load
from lora_export.workflows.pipelines.measuring import (
    measure,
    own_side,
    refuse_without_denoiser,
    with_own_size,
    with_pictures,
)

B, N = "batch_size", "sequence_length"


def signature(**inputs: tuple[int | str, ...]) -> Signature:
    return Signature({n: GraphValue(n, "tensor(float)", shape) for n, shape in inputs.items()}, {})


SDXL = signature(
    sample=(B, 4, "height", "width"), timestep=(), encoder_hidden_states=(B, N, 64), text_embeds=(B, 32),
    time_ids=(B, 6),
)  # fmt: skip
SD3 = signature(
    hidden_states=(B, 16, "height", "width"), encoder_hidden_states=(B, N, 64), pooled_projections=(B, 48),
    timestep=("step",),
)  # fmt: skip
FLUX = signature(
    hidden_states=(B, "packed_height_width", 16), encoder_hidden_states=(B, N, 32), pooled_projections=(B, 24),
    timestep=("step",), guidance=(B,), txt_ids=(N, 3), img_ids=("packed_height_width", 3),
)  # fmt: skip


@pytest.mark.parametrize(
    ("graph", "shapes"),
    [
        (SDXL, {"sample": (3, 4, 10, 10), "timestep": (), "encoder_hidden_states": (3, 77, 64),
                "text_embeds": (3, 32), "time_ids": (3, 6)}),
        (SD3, {"hidden_states": (3, 16, 10, 10), "encoder_hidden_states": (3, 333, 64),
               "pooled_projections": (3, 48), "timestep": (3,)}),
        (FLUX, {"hidden_states": (3, 25, 16), "encoder_hidden_states": (3, 512, 32), "pooled_projections": (3, 24),
                "timestep": (3,), "guidance": (3,), "txt_ids": (512, 3), "img_ids": (25, 3)}),
    ],
)  # fmt: skip
def test_step_feed_of_each_family_has_the_shapes_of_a_step(graph: Signature, shapes: dict[str, Any]) -> None:
    feed = step_feed(graph, 3, 10)
    assert is_denoiser(graph) and {n: a.shape for n, a in feed.items()} == shapes
    assert {str(a.dtype) for a in feed.values()} == {"float32"}
    assert all(np.array_equal(a, step_feed(graph, 3, 10)[n]) for n, a in feed.items())


def test_step_feed_of_flux_counts_rows_and_tells_a_share_of_the_range() -> None:
    feed = step_feed(FLUX, 1, 4)
    assert feed["img_ids"].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
    assert feed["timestep"].tolist() == [0.5] and step_feed(SD3, 1, 4)["timestep"].tolist() == [500.0]


def test_as_arguments_of_sdxl_puts_what_is_added_into_its_mapping() -> None:
    given = as_arguments({"sample": 1, "timestep": 2, "text_embeds": 3, "time_ids": 4})
    assert given == {"sample": 1, "timestep": 2, "added_cond_kwargs": {"text_embeds": 3, "time_ids": 4}}
    assert as_arguments({"hidden_states": 1}) == {"hidden_states": 1}


def test_is_denoiser_of_a_decoder_is_false() -> None:
    assert not is_denoiser(signature(input_ids=(B, N), attention_mask=(B, N)))
    assert Shape.of("denoise", 2, 16) == Shape(2, 0, 16)


# --- measuring -----------------------------------------------------------------------------------------------


def export(folder: Path, value: float, *, nodes: int = 1, parts: tuple[str, ...] = ("unet", "vae_decoder")) -> Path:
    """Graphs that are no models, with a denoiser's inputs and a weight of their own."""
    for part in parts:
        (folder / part).mkdir(parents=True)
        inputs = {"sample": [B, 4, "h", "w"], "timestep": [], "encoder_hidden_states": [B, N, 8]}
        made = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in inputs.items()]
        weight = numpy_helper.from_array(np.full((4, 4, 3, 3), value, np.float32), "w")
        chain = [helper.make_node("Conv", ["sample", "w"], ["c0"], pads=[1, 1, 1, 1])]
        chain += [helper.make_node("Sigmoid", [f"c{i}"], [f"c{i + 1}"]) for i in range(nodes)]
        chain += [
            helper.make_node("ReduceMean", ["encoder_hidden_states"], ["m"], keepdims=0),
            helper.make_node("Add", ["m", "timestep"], ["a"]),
            helper.make_node("Add", [f"c{nodes}", "a"], ["out_sample"]),
        ]
        out = helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, [B, 4, "h", "w"])
        graph = helper.make_graph(chain, part, made, [out], [weight])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.save(model, folder / part / "model.onnx")
    return folder


class Step(torch.nn.Module):
    """A denoiser of diffusers, as far as it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(4, 4, 3, padding=1).half()
        self.seen: list[dict[str, Any]] = []

    def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any, return_dict: bool) -> Any:
        self.seen.append({"sample": sample, "timestep": timestep, "states": encoder_hidden_states})
        assert not return_dict
        return (self.layer(sample),)


SIDE = 16
OPTIONS = BenchmarkOptions(provider="cpu", shapes=((2, 12),), max_seconds=0.4, margin=0.5)


def test_measure_times_the_step_and_compares_the_graphs_of_all_parts(tmp_path: Path) -> None:
    base, merged = export(tmp_path / "base", 0.1), export(tmp_path / "merged", 0.2)
    step = Step()
    result = measure(base, merged, OPTIONS, SIDE, Silent(), {"pytorch": lambda device: step.to(device)})
    (cell,) = result.cells
    assert (cell.phase, cell.batch, cell.prompt, cell.key) == ("denoise", 2, 12, "b2/p12/denoise")
    assert {"base", "merged", "pytorch"} <= cell.arms.keys()
    times = cell.arms["merged"]
    assert times.tokens_per_second == pytest.approx(1000 * 2 / times.p50.ms)  # latents, not pixels
    assert result.graph_identical and result.graphs.keys() == {"unet", "vae_decoder"}
    given = step.seen[0]
    assert given["sample"].shape == (2, 4, 12, 12) and given["sample"].dtype == torch.float16
    assert given["timestep"].shape == ()


def test_measure_of_another_graph_in_one_part_says_which(tmp_path: Path) -> None:
    base, merged = (
        export(tmp_path / "base", 0.1, parts=("unet",)),
        export(tmp_path / "merged", 0.2, parts=("unet",)),
    )
    export(base, 0.1, parts=("vae_decoder",))
    export(merged, 0.1, nodes=2, parts=("vae_decoder",))
    result = measure(base, merged, OPTIONS, SIDE, Silent())
    assert result.graph_identical is False and result.graphs["unet"].identical
    assert result.graph_differences and all(d.startswith("vae_decoder: ") for d in result.graph_differences)


def test_measure_of_an_equal_denoiser_beside_another_part_is_inconclusive(tmp_path: Path) -> None:
    base, merged = (export(tmp_path / name, 0.1, parts=("unet",)) for name in ("base", "merged"))
    export(base, 0.1, parts=("vae_decoder",))
    export(merged, 0.1, nodes=2, parts=("vae_decoder",))
    result = measure(base, merged, replace(OPTIONS, max_seconds=None), SIDE, Silent())
    assert [c.verdict for c in result.cells] == ["equivalent_by_structure"]
    assert result.verdict == "inconclusive" and not result.graph_identical
    assert any("but vae_decoder is not, which was not measured" in note for note in result.notes)


def test_measure_of_other_parts_is_refused(tmp_path: Path) -> None:
    base, merged = export(tmp_path / "base", 0.1), export(tmp_path / "merged", 0.2, parts=("unet",))
    with pytest.raises(InputError, match="unet, vae_decoder and unet"):
        measure(base, merged, OPTIONS, SIDE, Silent())


def pipeline(denoiser: dict[str, Any] | None, vae: dict[str, Any]) -> Pipeline:
    parts = {"vae": Component("vae", Path("vae"), "diffusers", "AutoencoderKL", vae)}
    if denoiser is not None:
        parts["unet"] = Component("unet", Path("unet"), "diffusers", "UNet2DConditionModel", denoiser)
    return Pipeline(Path("pipeline"), "StableDiffusionPipeline", parts)


@pytest.mark.parametrize(
    ("denoiser", "vae", "side"),
    [
        ({"sample_size": 96}, {}, 96),
        ({"sample_size": [48, 64]}, {}, 48),
        ({}, {"sample_size": 1024, "block_out_channels": [1, 2, 3, 4]}, 128),
        ({}, {}, 64),
        ({"sample_size": "large"}, {}, 64),
    ],
)
def test_own_side_follows_the_configurations(denoiser: dict[str, Any], vae: dict[str, Any], side: int) -> None:
    assert own_side(pipeline(denoiser, vae)) == side


def test_with_own_size_takes_the_batches_of_a_grid_and_leaves_other_shapes() -> None:
    def shapes(asked: Shapes | None, alike: bool) -> Shapes | None:
        return with_own_size(BenchmarkOptions(shapes=asked), 96, alike=alike)[0].shapes

    assert shapes(GRIDS["standard"], True) == ((1, 96), (8, 96))
    assert shapes(((3, 40),), False) == ((3, 40),)
    assert shapes(None, True) == ((1, 96),) and shapes(None, False) == ((1, 96), (8, 96))
    assert "grid standard" in with_own_size(BenchmarkOptions(), 96, alike=False)[1]


def test_refuse_without_denoiser_names_the_class() -> None:
    with pytest.raises(InputError, match="StableDiffusionPipeline has neither a unet nor a transformer"):
        refuse_without_denoiser(pipeline(None, {}))


def test_measure_of_a_denoiser_alone_takes_its_only_graph(tmp_path: Path) -> None:
    base, merged = export(tmp_path / "base", 0.1), export(tmp_path / "merged", 0.2)
    result = measure(base / "unet", merged / "unet", OPTIONS, SIDE, Silent())
    assert result.graphs.keys() == {"denoiser"} and result.cells[0].phase == "denoise"
    told = with_pictures(result, base / "unet", merged / "unet", None, Silent())
    assert "no time of a picture: a denoiser alone makes none" in told.notes


def test_benchmark_of_exported_pipelines_writes_a_report(tmp_path: Path) -> None:
    folders, parts = [], {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index = {"_class_name": "KandinskyPipeline", **parts}
    for name, value in (("base", 0.1), ("merged", 0.2)):
        folder = export(tmp_path / name, value)
        (folder / "model_index.json").write_text(json.dumps(index))
        (folder / "unet" / "config.json").write_text(json.dumps({"sample_size": 10}))
        (folder / "vae_decoder" / "config.json").write_text(json.dumps({"block_out_channels": [8, 8]}))
        folders.append(str(folder))
    out = tmp_path / "latency"
    told = [
        "benchmark",
        "-b",
        folders[0],
        "-m",
        folders[1],
        "-o",
        str(out),
        "--max-time",
        "1s",
        "--margin",
        "50%",
    ]
    result = CliRunner().invoke(cli, told)
    assert result.exit_code == 0, result.output
    assert "denoise b1 latent 10" in result.output
    bench = load(out).benchmark
    assert bench and bench.graphs.keys() == {"unet", "vae_decoder"} and bench.pictures == ()
    assert any("no package is made of KandinskyPipeline" in note for note in bench.notes)
    for more, words in ((["-u", folders[0]], "--unmerged with an exported"), ([], "measured against its base")):
        told = ["benchmark", *(["-b", folders[0]] if more else []), "-m", folders[1], "-o", str(tmp_path / "other")]
        result = CliRunner().invoke(cli, [*told, *more])
        assert result.exit_code == 1 and words in result.output, result.output
    assert not (tmp_path / "other").exists()
