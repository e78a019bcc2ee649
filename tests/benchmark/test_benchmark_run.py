"""Real sessions on small graphs, from files to a verdict."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper

from lora_export import benchmark
from lora_export.benchmark import environment, sessions, study
from lora_export.contracts import BenchmarkOptions
from lora_export.errors import InputError
from lora_export.progress import Silent

WIDTH, HEAD, VOCABULARY = 192, 8, 1000


def _weights(name: str, *shape: int) -> onnx.TensorProto:
    values = np.random.default_rng(sum(map(ord, name))).standard_normal(shape) / np.sqrt(WIDTH)
    return numpy_helper.from_array(values.astype(np.float32), name)


def graph(path: Path, layers: int, *, decoder: bool = True) -> Path:
    """Embedding, a chain of MatMuls, logits; a decoder also has one layer of KV cache."""
    nodes = [h.make_node("Gather", ["embedding", "input_ids"], ["h0"])]
    nodes += [h.make_node("MatMul", [f"h{i}", f"w{i}"], [f"h{i + 1}"]) for i in range(layers)]
    nodes.append(h.make_node("MatMul", [f"h{layers}", "head"], ["logits"]))
    weights = [_weights("embedding", VOCABULARY, WIDTH), _weights("head", WIDTH, VOCABULARY)]
    weights += [_weights(f"w{i}", WIDTH, WIDTH) for i in range(layers)]
    ints = ("input_ids", "attention_mask", "position_ids" if decoder else "token_type_ids")
    inputs = [h.make_tensor_value_info(n, T.INT64, ["b", f"{n}_length"]) for n in ints]
    outputs = [h.make_tensor_value_info("logits", T.FLOAT, ["b", "s", VOCABULARY])]
    if decoder:
        weights += [_weights("wk", WIDTH, HEAD), numpy_helper.from_array(np.array([1]), "one")]
        nodes.append(h.make_node("MatMul", [f"h{layers}", "wk"], ["flat"]))
        nodes.append(h.make_node("Unsqueeze", ["flat", "one"], ["new"]))
        for part in ("key", "value"):
            past, present = f"past_key_values.0.{part}", f"present.0.{part}"
            nodes.append(h.make_node("Concat", [past, "new"], [present], axis=2))
            inputs.append(h.make_tensor_value_info(past, T.FLOAT, ["b", 1, "past", HEAD]))
            outputs.append(h.make_tensor_value_info(present, T.FLOAT, ["b", 1, "total", HEAD]))
    made = h.make_graph(nodes, "small", inputs, outputs, weights)
    onnx.save(h.make_model(made, opset_imports=[h.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that wait for each other are at the mercy of whatever else runs here."""
    monkeypatch.setattr(environment, "usable_cores", lambda: 1)


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., Path]:
    return lambda name, layers, **kw: graph(tmp_path / f"{name}.onnx", layers, **kw)


def options(**kw: object) -> BenchmarkOptions:
    return BenchmarkOptions(**{"provider": "cpu", "prompts": (24,), "margin": 0.25, "max_seconds": 6.0} | kw)  # type: ignore[arg-type]


def test_a_slower_graph_is_found_slower(small: Callable[..., Path]) -> None:
    result = benchmark.run(
        merged=small("merged", 40),
        base=small("base", 8),
        unmerged=None,
        options=options(max_seconds=30.0),
        progress=Silent(),
    )
    assert result.verdict == "slower"
    assert {c.phase for c in result.cells} == {"prefill", "decode"}
    assert all(c.ci_low and c.ci_low > 1.25 for c in result.cells if c.verdict == "slower")
    assert result.provider == "cpu" and result.provider_verified


def test_the_same_graph_with_other_weights_is_not(small: Callable[..., Path]) -> None:
    result = benchmark.run(
        merged=small("merged", 8),
        base=small("base", 8),
        unmerged=small("unmerged", 40),
        options=options(batches=(1, 3)),
        progress=Silent(),
        identity=(True, ()),
    )
    assert result.verdict != "slower"
    assert result.graph_identical is True
    assert len(result.cells) == 4 and {c.batch for c in result.cells} == {1, 3}
    cell = result.cells[0]
    assert cell.unmerged_ci_low and cell.unmerged_ci_low > 1
    assert cell.noise_floor is not None and cell.pairs >= 2
    assert set(result.samples["b3/p24/decode"]) == {"base", "base_again", "merged", "unmerged"}
    assert len(result.samples["b1/p24/prefill"]["merged"]) >= cell.pairs * 2


def test_without_a_base_there_are_times_and_no_verdict(small: Callable[..., Path]) -> None:
    result = benchmark.run(
        merged=small("merged", 2), base=None, unmerged=None, options=options(max_seconds=2), progress=Silent()
    )
    assert result.verdict == "inconclusive"
    assert all(c.ratio is None and c.base_ms is None and c.merged_ms > 0 for c in result.cells)
    assert any("without a base" in note for note in result.notes)


def test_an_encoder_has_no_decode_phase(small: Callable[..., Path]) -> None:
    model = small("encoder", 2, decoder=False)
    result = benchmark.run(
        merged=model, base=model, unmerged=None, options=options(max_seconds=2), progress=Silent()
    )
    assert [c.phase for c in result.cells] == ["prefill"]


def test_little_memory_measures_the_base_against_itself(
    small: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "available_memory", lambda: 0)
    model = small("model", 2)
    result = benchmark.run(
        merged=model, base=model, unmerged=None, options=options(max_seconds=2), progress=Silent()
    )
    assert any("memory holds one session" in note for note in result.notes)
    assert result.noise_floor is not None


def test_too_little_time_is_inconclusive_and_says_so(small: Callable[..., Path]) -> None:
    model = small("model", 8)
    result = benchmark.run(
        merged=model, base=model, unmerged=None, options=options(max_seconds=0.001), progress=Silent()
    )
    assert result.verdict == "inconclusive"
    assert any("blocks fitted" in note for note in result.notes)


def one_node(path: Path, name: str, dtype: int, dims: list[str | int]) -> Path:
    """A graph of one node with one input of this name and shape."""
    given, out = h.make_tensor_value_info(name, dtype, dims), h.make_tensor_value_info("out", dtype, dims)
    made = h.make_graph([h.make_node("Identity", [name], ["out"])], "one", [given], [out])
    onnx.save(h.make_model(made, opset_imports=[h.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_unknown_inputs_are_refused_by_name(tmp_path: Path) -> None:
    model = one_node(tmp_path / "model.onnx", "bbox", T.INT64, ["batch", "length", 4])
    with pytest.raises(InputError, match=r"bbox \(tensor\(int64\)\)"):
        benchmark.run(merged=model, base=None, unmerged=None, options=options(), progress=Silent())


@pytest.mark.parametrize(
    ("name", "dims", "expected"),
    [
        ("pixel_values", ["batch_size", 3, 8, 8], (2, 3, 8, 8)),
        ("input_values", ["batch_size", "sequence_length"], (2, 5 * 320)),
        ("encoder_hidden_states", ["batch_size", "encoder_sequence_length", 4], (2, 7, 4)),
        ("past_key_values.0.encoder.key", ["batch_size", 2, "encoder_sequence_length", 4], (2, 2, 7, 4)),
    ],
)
def test_signals_states_and_caches_are_made_up_in_their_shapes(
    tmp_path: Path, name: str, dims: list[str | int], expected: tuple[int, ...]
) -> None:
    engine = sessions.Engine(one_node(tmp_path / "model.onnx", name, T.FLOAT, dims), "cpu", 1)
    buffers = sessions.Buffers("cpu")
    engine.call(sessions.Shape(2, 7, 5), buffers)()
    assert {tuple(v.shape()) for v in buffers._values.values()} == {expected}


def test_an_encoder_decoder_is_measured_as_prompt_and_step(small: Callable[..., Path]) -> None:
    encoder, step = small("encoder", 2, decoder=False), small("step", 1, decoder=False)
    result = benchmark.run(
        merged=encoder, base=encoder, unmerged=None, steps=(step, step), options=options(), progress=Silent()
    )
    assert [c.phase for c in result.cells] == ["prefill", "decode"]
    assert result.cells[1].merged_ms < result.cells[0].merged_ms


def test_no_prompt_is_longer_than_the_model_has_positions(small: Callable[..., Path]) -> None:
    model = small("short", 1)
    model.with_name("config.json").write_text('{"max_position_embeddings": 16}')
    result = benchmark.run(
        merged=model, base=None, unmerged=None, options=options(prompts=(8, 64, 128)), progress=Silent()
    )
    assert {c.prompt for c in result.cells} == {8, 12}
    assert "prompts of at most 12 tokens: config.json knows 16 positions" in result.notes


def test_decode_sees_the_cache_that_a_prefill_left(small: Callable[..., Path]) -> None:
    engine = sessions.Engine(small("model", 2), "cpu", 1)
    buffers = sessions.Buffers("cpu")
    engine.call(sessions.Shape(2, 5, 1), buffers)()
    cache = {key[0]: value for key, value in buffers._values.items() if value.shape()[-1:] == [HEAD]}
    past, present = cache["past_key_values.0.key"].numpy(), cache["present.0.key"].numpy()
    assert past.shape == (2, 1, 5, HEAD) and present.shape == (2, 1, 6, HEAD)
    np.testing.assert_array_equal(present[:, :, :5], past)
    assert np.abs(past).min() > 0


def test_arms_share_their_buffers(small: Callable[..., Path]) -> None:
    buffers = sessions.Buffers("cpu")
    shape = sessions.Shape(1, 4, 1)
    sessions.Engine(small("a", 2), "cpu", 1).call(shape, buffers)
    count = len(buffers._values)
    sessions.Engine(small("b", 3), "cpu", 1).call(shape, buffers)
    assert len(buffers._values) == count


def test_a_cpu_profile_finds_every_node_on_the_cpu(small: Callable[..., Path]) -> None:
    assert sessions.misplaced(small("model", 2), "cpu", 1, sessions.Shape(1, 0, 4)) == ()


def test_cuda_cells_come_with_and_without_graphs_and_survive_a_failed_capture(
    small: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA played by the CPU: the order of cells, the notes and the verification, not the device."""
    real = sessions.Engine

    def engine(model: Path, provider: str, threads: int, *, cuda_graph: bool = False) -> sessions.Engine:
        made = real(model, "cpu", threads)
        if cuda_graph and model.stem == "unmerged":
            made.call = _raise  # type: ignore[method-assign]
        return made

    monkeypatch.setattr(study, "Engine", engine)
    monkeypatch.setattr(study, "misplaced", lambda model, *_: ("MatMul on CPU",) * (model.stem == "base"))
    monkeypatch.setattr(study.runtime, "resolve_provider", lambda name: "cuda")
    result = benchmark.run(
        merged=small("merged", 2),
        base=small("base", 2),
        unmerged=small("unmerged", 9),
        options=options(provider="cuda", max_seconds=4),
        progress=Silent(),
    )
    assert [(c.phase, c.cuda_graph) for c in result.cells] == [
        ("prefill", False),
        ("decode", False),
        ("prefill", True),
        ("decode", True),
    ]
    assert [c.unmerged_ms is None for c in result.cells] == [False, False, True, True]
    assert not result.provider_verified
    assert "base: MatMul on CPU" in result.notes
    assert any("no CUDA graph of unmerged" in note for note in result.notes)
    assert "b1/p24/decode/cuda_graph" in result.samples


def _raise(*args: object) -> None:
    raise RuntimeError("capture is not possible\nsecond line")


def test_the_environment_names_no_machine() -> None:
    import platform

    told = str(environment.describe() | environment.snapshot())
    assert not platform.node() or platform.node() not in told
    assert "cpu" in environment.describe() and environment.available_memory() > 0


def test_nvidia_smi_table() -> None:
    table = "NVIDIA H100, 570.1, 1980 MHz, 2619 MHz, 120.5 W, 35, 0x0000000000000000\n\nbroken, line\n"
    (gpu,) = environment.parse_gpus(table)
    assert gpu["name"] == "NVIDIA H100" and gpu["clocks.sm"] == "1980 MHz"
