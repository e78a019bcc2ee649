"""Real sessions on small graphs, from files to a verdict."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper

from lora_export import benchmarking
from lora_export.benchmarking import arms as opened_arms
from lora_export.benchmarking import benchmark, environment, sessions, study
from lora_export.benchmarking.buffers import Buffers, Shape
from lora_export.benchmarking.gpus import Gpus
from lora_export.contracts import BenchmarkArm, BenchmarkOptions, BenchmarkResult, GraphComparison
from lora_export.errors import InputError
from lora_export.onnx_export.graphs.slots import LoraSlot, write_adapter
from lora_export.progress import Silent

# Verdicts need a machine to themselves; that arms, caches and notes are right does not.
quiet = pytest.mark.timing

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
    return BenchmarkOptions(**{"provider": "cpu", "shapes": ((1, 24),), "margin": 0.25, "max_seconds": 6.0} | kw)  # type: ignore[arg-type]


def run(
    merged: Path | tuple[Path, ...],
    base: Path | tuple[Path, ...] | None = None,
    unmerged: Path | None = None,
    *more: BenchmarkArm,
    graph: GraphComparison | None = None,
    **kw: object,
) -> BenchmarkResult:
    named = {"base": base, "merged": merged, "unmerged": unmerged}
    arms = [BenchmarkArm(n, g if isinstance(g, tuple) else (g,)) for n, g in named.items() if g]
    return benchmarking.run([*arms, *more], options=options(**kw), progress=Silent(), graph=graph)


IDENTICAL = GraphComparison(True, "a" * 64, "a" * 64, 9, {"CPUExecutionProvider": 9})


@quiet
def test_run_slower_graph_is_slower(small: Callable[..., Path]) -> None:
    result = run(
        merged=small("merged", 40),
        base=small("base", 8),
        max_seconds=30.0,
    )
    assert result.verdict == "slower"
    assert {c.phase for c in result.cells} == {"prefill", "decode"}
    assert all(c.ci_low and c.ci_low > 1.25 for c in result.cells if c.verdict == "slower")
    assert result.provider == "cpu" and result.provider_verified


@quiet
def test_run_identical_graphs_need_confirmation_in_other_sessions(
    small: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[object] = []
    real_open, real_conclude = study._opened, study.conclude
    monkeypatch.setattr(study, "_opened", lambda *a, **kw: opened.append(a) or real_open(*a, **kw))
    slow, base = small("merged", 40), small("base", 8)
    found = run(slow, base, max_seconds=20, shapes=((1, 64),), graph=IDENTICAL)
    assert found.verdict == "slower" and len(opened) >= 2

    verdicts = iter(["slower", "equivalent", "equivalent"])
    monkeypatch.setattr(study, "conclude", lambda *a: replace(real_conclude(*a), verdict=next(verdicts)))
    found = run(base, base, max_seconds=1, graph=IDENTICAL)
    assert [c.verdict for c in found.cells] == ["equivalent_by_structure", "equivalent"]
    reason = found.cells[0].reason
    assert "the sessions differ, not the graphs" in reason and any(reason in note for note in found.notes)


def test_run_session_sets_open_in_other_orders(small: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    orders: list[list[str]] = []
    real = opened_arms.OpenedArms.open
    monkeypatch.setattr(
        opened_arms.OpenedArms, "open", lambda self, arms, part: orders.append([*arms]) or real(self, arms, part)
    )
    result = run(small("merged", 4), small("base", 4), small("unmerged", 30), sessions=6, max_seconds=5)
    assert len(orders) == 6 and orders[0] == ["base", "merged", "base_again", "unmerged"]
    assert len({tuple(order) for order in orders}) > 2
    for cell in result.cells:
        key = f"b1/p24/{cell.phase}"
        assert cell.sessions == 6 and cell.pairs >= 12 and len(result.conditions[key]) == cell.pairs
        assert list(cell.arms) == ["base", "merged", "unmerged"]
    few = run(small("merged", 4), small("base", 4), sessions=2, max_seconds=1)
    assert all("sets of sessions" in cell.reason for cell in few.cells)


@quiet
def test_run_same_graph_with_other_weights_is_not_slower(small: Callable[..., Path]) -> None:
    result = run(
        merged=small("merged", 8),
        base=small("base", 8),
        unmerged=small("unmerged", 40),
        shapes=((1, 24), (3, 24)),
        graph=IDENTICAL,
    )
    assert result.verdict in ("equivalent", "equivalent_by_structure")
    assert result.graph_identical is True
    assert len(result.cells) == 4 and {c.batch for c in result.cells} == {1, 3}
    cell = result.cells[0]
    assert cell.unmerged_ci_low and cell.unmerged_ci_low > 1
    assert cell.noise_floor is not None and cell.pairs >= 2
    assert set(result.samples["b3/p24/decode"]) == {"base", "base_again", "merged", "unmerged"}
    assert len(result.samples["b1/p24/prefill"]["merged"]) >= cell.pairs * 2


def test_run_without_base_has_times_and_no_verdict(small: Callable[..., Path]) -> None:
    result = run(
        merged=small("merged", 2),
        max_seconds=1,
    )
    assert result.verdict == "inconclusive"
    assert all(c.ratio is None and c.base_ms is None and c.merged_ms > 0 for c in result.cells)
    assert any("no base to compare with" in note for note in result.notes)


def test_run_encoder_has_no_decode_phase(small: Callable[..., Path]) -> None:
    model = small("encoder", 2, decoder=False)
    result = run(
        merged=model,
        base=model,
        max_seconds=1,
    )
    (cell,) = result.cells
    assert cell.phase == "prefill" and cell.arms["merged"].first_token_ms is None


def test_run_with_little_memory_measures_base_against_itself(
    small: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "memory", lambda provider, gpus: (0, 0))
    model = small("model", 2)
    result = run(
        merged=model,
        base=model,
        max_seconds=1,
    )
    assert any("memory holds only one session" in note for note in result.notes)
    assert result.noise_floor is not None


def test_run_with_too_little_time_is_inconclusive(small: Callable[..., Path]) -> None:
    model = small("model", 8)
    result = run(
        merged=model,
        base=model,
        max_seconds=0.001,
    )
    assert result.verdict == "inconclusive"
    assert any("blocks fitted" in note for note in result.notes)


def one_node(path: Path, name: str, dtype: int, dims: list[str | int]) -> Path:
    """A graph of one node with one input of this name and shape."""
    given, out = h.make_tensor_value_info(name, dtype, dims), h.make_tensor_value_info("out", dtype, dims)
    made = h.make_graph([h.make_node("Identity", [name], ["out"])], "one", [given], [out])
    onnx.save(h.make_model(made, opset_imports=[h.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_run_unknown_input_is_refused(tmp_path: Path) -> None:
    model = one_node(tmp_path / "model.onnx", "puzzle", T.INT64, ["batch", "length", 4])
    with pytest.raises(InputError, match=r"puzzle \(tensor\(int64\)\)"):
        run(
            merged=model,
        )


@pytest.mark.parametrize(
    ("name", "dims", "expected"),
    [
        ("pixel_values", ["batch_size", 3, 8, 8], (2, 3, 8, 8)),
        ("input_values", ["batch_size", "sequence_length"], (2, 5 * 320)),
        ("encoder_hidden_states", ["batch_size", "encoder_sequence_length", 4], (2, 7, 4)),
        ("past_key_values.0.encoder.key", ["batch_size", 2, "encoder_sequence_length", 4], (2, 2, 7, 4)),
    ],
)
def test_feeds_have_declared_shapes(
    tmp_path: Path, name: str, dims: list[str | int], expected: tuple[int, ...]
) -> None:
    engine = sessions.ArmSession(one_node(tmp_path / "model.onnx", name, T.FLOAT, dims), "cpu", 1)
    buffers = Buffers("cpu")
    engine.call(Shape(2, 7, 5), buffers).run()
    assert {tuple(v.shape()) for v in buffers.values.values()} == {expected}


def test_run_encoder_decoder_has_prompt_and_step(small: Callable[..., Path]) -> None:
    graphs = (small("encoder", 2, decoder=False), small("step", 1, decoder=False))
    result = run(graphs, graphs, max_seconds=1)
    assert [c.phase for c in result.cells] == ["prefill", "decode"]
    assert result.cells[1].merged_ms < result.cells[0].merged_ms


def test_run_prompts_fit_model_positions(small: Callable[..., Path]) -> None:
    model = small("short", 1)
    model.with_name("config.json").write_text('{"max_position_embeddings": 16}')
    result = run(
        merged=model,
        shapes=((1, 8), (1, 64), (1, 128)),
        max_seconds=1,
    )
    assert {c.prompt for c in result.cells} == {8, 12}
    assert "prompts were cut to 12 tokens: the model has 16 positions" in result.notes


def test_run_prompts_fit_positions_of_every_arm(small: Callable[..., Path], tmp_path: Path) -> None:
    graphs = {}
    for name, positions in (("base", 16), ("merged", 64)):
        (tmp_path / name).mkdir()
        graphs[name] = small(f"{name}/model", 1)
        graphs[name].with_name("config.json").write_text(f'{{"max_position_embeddings": {positions}}}')
    result = run(graphs["merged"], graphs["base"], shapes=((1, 32),), max_seconds=0.5)
    assert {c.prompt for c in result.cells} == {12}


def test_decode_reads_cache_of_prefill(small: Callable[..., Path]) -> None:
    engine = sessions.ArmSession(small("model", 2), "cpu", 1)
    buffers = Buffers("cpu")
    engine.call(Shape(2, 5, 1), buffers).run()
    cache = {key[0]: value for key, value in buffers.values.items() if value.shape()[-1:] == [HEAD]}
    past, present = cache["past_key_values.0.key"].numpy(), cache["present.0.key"].numpy()
    assert past.shape == (2, 1, 5, HEAD) and present.shape == (2, 1, 6, HEAD)
    np.testing.assert_array_equal(present[:, :, :5], past)
    assert np.abs(past).min() > 0


def test_arms_share_buffers(small: Callable[..., Path]) -> None:
    buffers = Buffers("cpu")
    shape = Shape(1, 4, 1)
    sessions.ArmSession(small("a", 2), "cpu", 1).call(shape, buffers)
    count, size = len(buffers.values), buffers.nbytes
    sessions.ArmSession(small("b", 3), "cpu", 1).call(shape, buffers)
    assert len(buffers.values) == count and buffers.nbytes == size > 0


def test_cpu_profile_places_every_node_on_cpu(small: Callable[..., Path]) -> None:
    assert sessions.misplaced(small("model", 2), "cpu", 1, Shape(1, 0, 4), None) == ()


def test_cuda_cells_have_both_graph_modes_and_survive_failed_capture(
    small: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA played by the CPU: the order of cells, the notes and the verification, not the device."""
    real = sessions.ArmSession

    def engine(model: Path, provider: str, threads: int, *, cuda_graph: bool, **kw: Any) -> sessions.ArmSession:
        made = real(model, "cpu", threads, **kw)
        if cuda_graph and model.stem == "unmerged":
            made.call = _raise  # type: ignore[method-assign]
        return made

    monkeypatch.setattr(opened_arms, "ArmSession", engine)
    monkeypatch.setattr(benchmark, "misplaced", lambda model, *_: ("MatMul on CPU",) * (model.stem == "base"))
    monkeypatch.setattr(benchmark.runtime, "resolve_provider", lambda name: "cuda")
    result = run(
        merged=small("merged", 2),
        base=small("base", 2),
        unmerged=small("unmerged", 9),
        provider="cuda",
        max_seconds=2.5,
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


def test_environment_names_no_machine() -> None:
    import platform

    told = str(environment.describe())
    assert not platform.node() or platform.node() not in told
    assert environment.describe().cpu
    assert min(environment.memory("cpu", Gpus())) > 0


# --- what a cell says of its arms ---------------------------------------------------------------------------


def test_percentiles_and_rates_match_samples(small: Callable[..., Path]) -> None:
    result = run(small("merged", 4), small("base", 4), small("unmerged", 30), shapes=((2, 24),), max_seconds=1.5)
    for cell in result.cells:
        samples = result.samples[f"b2/p24/{cell.phase}"]
        for name, arm in cell.arms.items():
            times = [*samples["base"], *samples["base_again"]] if name == "base" else samples[name]
            found = [arm.p50.ms, arm.p95.ms, arm.p99.ms]
            np.testing.assert_allclose(found, np.quantile(times, [0.5, 0.95, 0.99]))
            assert arm.p50.low <= arm.p50.ms <= arm.p50.high
            tokens = 2 * (24 if cell.phase == "prefill" else 1)
            assert arm.tokens_per_second == pytest.approx(1000 * tokens / arm.p50.ms)
            assert arm.first_token_ms == (arm.p50.ms if cell.phase == "prefill" else None)
        assert cell.arms["unmerged"].ratio == cell.unmerged_ratio and cell.control == "unmerged"


def test_every_block_has_a_machine_reading(small: Callable[..., Path]) -> None:
    result = run(small("merged", 2), small("base", 2), max_seconds=1)
    for cell in result.cells:
        key = f"b1/p24/{cell.phase}"
        assert len(result.conditions[key]) == cell.pairs
        assert all(0 <= reading.steal <= 100 for reading in result.conditions[key])
        assert len(result.environment.blocks[key]["load"]) == 3


def test_arm_memory_excludes_shared_buffers(small: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter(range(0, 10**9, 10**6))
    monkeypatch.setattr(environment, "memory", lambda provider, gpus: (next(used), 10**12))
    result = run(small("merged", 2), small("base", 2), small("unmerged", 3), max_seconds=1)
    found = {name: arm.memory_bytes for name, arm in result.cells[0].arms.items()}
    # once to open, and once to run in each cell before; it needs no buffer that base does not have
    assert found["merged"] == 2 * 10**6
    assert found["base"] is not None and found["base"] < 2 * 10**6


def test_arms_of_one_graph_open_at_once_and_share_their_memory(
    small: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = iter(range(0, 10**10, 3 * 10**6))
    monkeypatch.setattr(environment, "memory", lambda provider, gpus: (next(used), 10**12))
    monkeypatch.setattr(opened_arms.OpenedArms, "bind", lambda self, *a: bound.update(vars(self)) or {})
    bound: dict[str, Any] = {}
    opened: list[str] = []
    real = opened_arms.OpenedArms._open
    monkeypatch.setattr(
        opened_arms.OpenedArms, "_open", lambda self, arm, part: opened.append(arm.name) or real(self, arm, part)
    )
    run(small("merged", 2), small("base", 2), small("unmerged", 3), graph=IDENTICAL, max_seconds=None)
    assert sorted(opened[:3]) == ["base", "base", "merged"] and opened[3:] == ["unmerged"]
    assert list(bound["opened"]) == ["base", "merged", "base_again", "unmerged"] and not bound["unmeasured"]
    assert bound["memory"] == dict.fromkeys(("base", "merged", "base_again"), 10**6) | {"unmerged": 3 * 10**6}


def test_arms_of_one_graph_open_one_by_one_where_memory_is_short(
    small: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "memory", lambda provider, gpus: (0, 0))
    found = run(small("merged", 2), small("base", 2), graph=IDENTICAL, max_seconds=None)
    assert found.verdict == "equivalent_by_structure"
    assert any("memory holds only one session" in note for note in found.notes)


def test_arms_share_what_a_run_found_of_outputs_and_filled(
    small: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Any] = []
    real = sessions.ArmSession._run_unbound
    monkeypatch.setattr(
        sessions.ArmSession, "_run_unbound", lambda self, *a, **kw: runs.append(self) or real(self, *a, **kw)
    )
    one, same, other = (sessions.ArmSession(small(n, size), "cpu", 1) for n, size in (("a", 2), ("b", 2), ("c", 3)))
    for engine in (one, same, other):
        _ = engine.kv_in_place
    runs.clear()
    buffers = Buffers("cpu")
    bound = [engine.call(Shape(1, 5, 1), buffers) for engine in (one, same, other)]
    assert runs == [one, one]  # its own cache, and its outputs; the others declare the same ones
    assert all(call.run() > 0 for call in bound)
    other.call(Shape(2, 5, 1), buffers)
    assert runs[2:] == [other, other]


# --- controls and other arms --------------------------------------------------------------------------------


@quiet
def test_control_without_slower_graph_is_delayed_base(small: Callable[..., Path]) -> None:
    result = run(small("merged", 8), small("base", 8), max_seconds=6)
    for cell in result.cells:
        assert cell.control == "delayed"
        delayed = cell.arms["delayed"]
        assert delayed.ratio is not None and 1.3 < delayed.ratio < 1.8  # two margins of 25 %


@quiet
def test_control_not_slower_is_inconclusive(small: Callable[..., Path]) -> None:
    result = run(small("merged", 8), small("base", 8), small("unmerged", 8), margin=0.4, max_seconds=6)
    fast = [c for c in result.cells if c.unmerged_ci_low is not None and c.unmerged_ci_low <= 1 and c.pairs >= 15]
    assert fast, "a graph that is the base's was found slower than it in every cell"
    assert all(c.verdict == "inconclusive" and c.reason for c in fast)


@quiet
def test_other_graphs_are_measured(small: Callable[..., Path]) -> None:
    other = BenchmarkArm("optimum", (small("other", 60),))
    result = run(small("merged", 4), small("base", 4), None, other, max_seconds=3)
    assert all(c.arms["optimum"].ratio > 1 for c in result.cells)  # type: ignore[operator]


@pytest.mark.parametrize("names", [("merged", "merged"), ("base", "unmerged"), ("merged", "base_again")])
def test_arms_with_equal_names_are_refused(small: Callable[..., Path], names: tuple[str, str]) -> None:
    arms = [BenchmarkArm(name, (small("model", 1),)) for name in names]
    with pytest.raises(InputError, match=names[-1]):
        benchmarking.run(arms, options=options(), progress=Silent())


def test_plugged_adapter_is_in_every_run(tmp_path: Path) -> None:
    """One projection with a slot: without an adapter it adds nothing, with one it adds x·down·up."""
    slot = LoraSlot("/model/layers.0/attn/q_proj", 0, "q_proj", 4, 3, "float")
    weight = np.random.default_rng(3).standard_normal((64, 4)).astype(np.float32).round(1)
    dims = {"down": ([4, "r"], [4, 0]), "up": (["r", 3], [0, 3])}
    inputs = [h.make_tensor_value_info("input_ids", T.INT64, ["b", "s"])]
    empty = []
    for name, (shape, none) in zip((slot.down, slot.up), dims.values(), strict=True):
        inputs.append(h.make_tensor_value_info(name, T.FLOAT, shape))
        empty.append(h.make_tensor(name, T.FLOAT, none, b"", raw=True))
    nodes = [
        h.make_node("Gather", ["w", "input_ids"], ["x"]),
        h.make_node("MatMul", ["x", slot.down], ["a"]),
        h.make_node("MatMul", ["a", slot.up], ["logits"]),
    ]
    outputs = [h.make_tensor_value_info("logits", T.FLOAT, ["b", "s", 3])]
    made = h.make_graph(nodes, "slot", inputs, outputs, [numpy_helper.from_array(weight, "w"), *empty])
    model = tmp_path / "plug.onnx"
    onnx.save(h.make_model(made, opset_imports=[h.make_opsetid("", 17)], ir_version=8), model)
    down, up = np.full((4, 2), 2, np.float32), np.full((2, 3), 5, np.float32)
    write_adapter(tmp_path / "a.onnx_adapter", {slot: (down, up)})

    def logits(adapter: Path | None) -> np.ndarray[Any, Any]:
        buffers = Buffers("cpu")
        engine = sessions.ArmSession(model, "cpu", 1, adapter=adapter)
        engine.call(Shape(1, 0, 2), buffers).run()
        (value,) = [v for key, v in buffers.values.items() if key[0] == "logits"]
        return value.numpy()

    assert not logits(None).any()
    drawn = np.random.default_rng(0).integers(0, 64, (1, 2))
    np.testing.assert_array_equal(logits(tmp_path / "a.onnx_adapter"), (weight[drawn] @ down @ up))


# --- the cache in place -------------------------------------------------------------------------------------


def attention(path: Path, kind: int = T.FLOAT) -> Path:
    """A decoder of one GroupQueryAttention, as the builder of onnxruntime-genai wires it. kind: FLOAT or
    FLOAT16."""
    width = 2 * HEAD
    qkv = h.make_node("MatMul", ["h", "wqkv"], ["qkv"])
    nodes = [
        h.make_node("Gather", ["embedding", "input_ids"], ["h"]),
        qkv,
        h.make_node("ReduceSum", ["attention_mask", "axis"], ["lengths"], keepdims=0),
        h.make_node("Sub", ["lengths", "one"], ["last"]),
        h.make_node("Cast", ["last"], ["seqlens_k"], to=T.INT32),
        h.make_node("Shape", ["attention_mask"], ["mask_shape"]),
        h.make_node("Gather", ["mask_shape", "index"], ["total"]),
        h.make_node("Cast", ["total"], ["total_length"], to=T.INT32),
        h.make_node(
            "GroupQueryAttention",
            ["qkv", "", "", "past_key_values.0.key", "past_key_values.0.value", "seqlens_k", "total_length"],
            ["mixed", "present.0.key", "present.0.value"],
            domain="com.microsoft", num_heads=2, kv_num_heads=1,
        ),
        h.make_node("MatMul", ["mixed", "head"], ["logits"]),
    ]  # fmt: skip
    numbers = [
        _weights("embedding", VOCABULARY, width),
        _weights("wqkv", width, 4 * HEAD),
        _weights("head", width, 50),
    ]
    narrow = h.tensor_dtype_to_np_dtype(kind)
    weights = [
        *(numpy_helper.from_array(numpy_helper.to_array(t).astype(narrow), t.name) for t in numbers),
        numpy_helper.from_array(np.array([1]), "axis"), numpy_helper.from_array(np.array([1]), "one"),
        numpy_helper.from_array(np.array(1), "index"),
    ]  # fmt: skip
    inputs = [h.make_tensor_value_info(n, T.INT64, ["b", n]) for n in ("input_ids", "attention_mask")]
    outputs = [h.make_tensor_value_info("logits", kind, ["b", "s", 50])]
    for part in ("key", "value"):
        inputs.append(h.make_tensor_value_info(f"past_key_values.0.{part}", kind, ["b", 1, "past", HEAD]))
        outputs.append(h.make_tensor_value_info(f"present.0.{part}", kind, ["b", 1, "total", HEAD]))
    made = h.make_graph(nodes, "attention", inputs, outputs, weights)
    opsets = [h.make_opsetid("", 17), h.make_opsetid("com.microsoft", 1)]
    onnx.save(h.make_model(made, opset_imports=opsets, ir_version=8), path)
    return path


def _logits(engine: sessions.ArmSession, shape: Shape) -> np.ndarray[Any, Any]:
    buffers = Buffers("cpu")
    bound = engine.call(shape, buffers)
    for _ in range(3):  # a step that is repeated writes the same keys into the same place
        bound.run()
    (value,) = [v for key, v in buffers.values.items() if key[0] == "logits"]
    return value.numpy().copy()


@pytest.mark.parametrize("shape", [Shape(2, 7, 1), Shape(2, 0, 7)])
def test_in_place_cache_gives_same_logits(tmp_path: Path, shape: Shape) -> None:
    model = attention(tmp_path / "model.onnx")
    engine, apart = sessions.ArmSession(model, "cpu", 1), sessions.ArmSession(model, "cpu", 1)
    assert engine.kv_in_place
    apart.__dict__["kv_in_place"] = False
    np.testing.assert_allclose(_logits(engine, shape), _logits(apart, shape), rtol=1e-5, atol=1e-6)


def test_arms_share_a_cache_that_one_of_them_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Any] = []
    real = sessions.ArmSession._run_unbound
    one, other = (sessions.ArmSession(attention(tmp_path / f"{n}.onnx"), "cpu", 1) for n in "ab")
    assert one.kv_in_place and other.kv_in_place
    monkeypatch.setattr(
        sessions.ArmSession, "_run_unbound", lambda self, *a, **kw: runs.append(self) or real(self, *a, **kw)
    )
    buffers = Buffers("cpu")
    assert all(engine.call(Shape(2, 7, 1), buffers).run() > 0 for engine in (one, other))
    assert runs == [one, one]  # the cache, and what is not known of the outputs
    other.call(Shape(2, 9, 1), buffers)
    assert runs[2:] == [other, other]


def test_copied_cache_is_measured_and_reported(small: Callable[..., Path]) -> None:
    model = small("model", 2)
    assert not sessions.ArmSession(model, "cpu", 1).kv_in_place
    result = run(model, model, max_seconds=1)
    assert any("cannot write into it" in note for note in result.notes)
    assert not any(c.kv_in_place for c in result.cells)


def test_in_place_cache_with_other_logits_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = sessions.ArmSession(attention(tmp_path / "model.onnx"), "cpu", 1)
    real = engine._one_cache

    def forgetful(*args: Any, **kw: Any) -> Any:
        cache = real(*args, **kw)
        for value in cache.values():
            value.update_inplace(np.zeros(value.shape(), np.float32))
        return cache

    monkeypatch.setattr(engine, "_one_cache", forgetful)
    assert not engine.kv_in_place


# --- PyTorch ------------------------------------------------------------------------------------------------


def test_pytorch_arm_repeats_unmerged_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from lora_export.benchmarking.pytorch import TorchSession

    config = LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
    base = LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    threads = torch.get_num_threads()
    try:
        engine = TorchSession(tmp_path / "base", tmp_path / "adapter", "cpu", 1)
        assert any("lora_A" in name for name, _ in engine._model.named_parameters())
        caches = []
        filled = engine._filled
        monkeypatch.setattr(engine, "_filled", lambda *a: caches.append(filled(*a)) or caches[0])
        bound = engine.call(Shape(2, 9, 1), Buffers("cpu"))
        assert all(bound.run() > 0 for _ in range(5))
        assert caches[0].get_seq_length() == 9  # each step is cut off again
        with pytest.raises(InputError, match="cannot load"):
            TorchSession(tmp_path / "base", tmp_path / "base", "cpu", 1)
    finally:
        torch.set_num_threads(threads)
