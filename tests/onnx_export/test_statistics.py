"""Statistics for GPTQ: the moments of what products multiply, as PyTorch's hooks see it, and their file."""

import wave
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers

from lora_export.checkpoint.header import build_header, read_header
from lora_export.contracts import CalibrationRecord, ExportOptions, ExportResult
from lora_export.errors import ExportError, InputError, LoraExportError
from lora_export.onnx_export import export
from lora_export.onnx_export.graphs.checks import open_model, serialized
from lora_export.onnx_export.quantize import calibration, speech
from lora_export.onnx_export.quantize.calibration import BUILT_IN, Rows
from lora_export.onnx_export.quantize.feeding import Stage, stages
from lora_export.onnx_export.quantize.moments import Inputs, Moment, inputs_of, moments
from lora_export.onnx_export.quantize.segments import SEGMENT, Shelf
from lora_export.onnx_export.quantize.segments import _segments as segments_of
from lora_export.onnx_export.quantize.statistics import NAME, Statistics, collect
from lora_export.onnx_export.quantize.statistics import _gather as gather
from lora_export.onnx_export.quantize.statistics import _Packed as packed
from lora_export.onnx_export.weights import map as weights_map
from lora_export.onnx_export.weights.map import Piece, Recipe, Weight, WeightsMap
from lora_export.progress import Silent
from lora_export.validation.comparing.texts import PROMPTS, RUNNING_TEXT
from tests.export_matrix.models import Row
from tests.onnx_export.architectures import DYNAMO, GENAI, save

Array = np.ndarray[Any, Any]
LINES = ["abc def, ghi.", "The cat sat on the mat; it was not amused by the dog.", "x = y + 1", "mn" * 40]
SEGMENTS_OF_ONE_NODE = -1


class Details(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def detail(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(LINES * 3))
    return path


def seen_by(model: torch.nn.Module, runs: Callable[[], object]) -> dict[str, Array]:
    """Σ x xᵀ / tokens of every linear layer's input, by the name of its weight."""
    sums: dict[str, Any] = {}
    tokens: dict[str, int] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | transformers.pytorch_utils.Conv1D):

            def seen(_: Any, given: Any, name: str = f"{name}.weight") -> None:
                rows = given[0].reshape(-1, given[0].shape[-1]).double()
                sums[name] = sums.get(name, 0) + rows.T @ rows
                tokens[name] = tokens.get(name, 0) + len(rows)

            handles.append(module.register_forward_pre_hook(seen))
    with torch.no_grad():
        runs()
    for handle in handles:
        handle.remove()
    return {name: (total / tokens[name]).numpy() for name, total in sums.items()}


def of_tensor(statistics: Statistics, name: str) -> Array | None:
    key = next((key for key in statistics.names if key.startswith(f"{name}[")), None)
    if key is None:
        return None
    start, stop = key.removeprefix(f"{name}[").removesuffix("]").split(":")
    return statistics.moment(Recipe((Piece(name, int(start), int(stop)),)))


def agree(statistics: Statistics, expected: dict[str, Array], prefix: str = "") -> int:
    """How many weights have the moments that PyTorch has."""
    found = 0
    for name, wanted in expected.items():
        moment = of_tensor(statistics, name.removeprefix(prefix))
        if moment is not None:
            assert np.allclose(moment.diagonal(), wanted.diagonal(), rtol=1e-4, atol=1e-6 * wanted.max()), name
            root = np.sqrt(np.maximum(wanted.diagonal(), 1e-30))
            allowed = 6e-4 * np.outer(root, root) + 1e-5 * wanted.max()  # an fp16 number, and GELU near 0
            assert (np.abs(moment - wanted) <= allowed).all(), name
            found += 1
    return found


# --- moments -----------------------------------------------------------------------------------------------


def test_collect_decoder_has_moments_of_pytorch(
    llama: Path, exported: Callable[..., ExportResult], text: Path, tmp_path: Path
) -> None:
    graph = exported(llama).output / "model.onnx"
    made = collect([graph], llama, text, tmp_path / NAME, skip=["lm_head.MatMul.weight"], progress=Silent())
    rows = Rows.of(llama).windows(text.read_text(), 8192)
    assert (made.tokens, made.windows) == (sum(map(len, rows)), len(rows)) and len(rows) > 3
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    expected = seen_by(model, lambda: [model(torch.tensor([row])) for row in rows])
    statistics = Statistics.open(tmp_path / NAME)
    assert statistics.calibration == made
    assert agree(statistics, expected) == 14 and of_tensor(statistics, "lm_head.weight") is None
    keys = {of.rpartition(".")[0]: statistics.names[of] for of in statistics.names}
    layer = "model.layers.1"
    assert len({keys[f"{layer}.self_attn.{n}_proj"] for n in "qkv"}) == 1
    assert len({keys[f"{layer}.{n}"] for n in ("self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")}) == 3


def test_collect_encoder_has_moments_of_pytorch(
    bert: Path, exported: Callable[..., ExportResult], text: Path, tmp_path: Path
) -> None:
    collect([exported(bert).output / "model.onnx"], bert, text, tmp_path / NAME, progress=Silent())
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    rows = [tokenizer(line)["input_ids"][:64] for line in LINES * 3]
    model = transformers.AutoModel.from_pretrained(bert, dtype=torch.float32)
    expected = seen_by(model, lambda: [model(torch.tensor([row])) for row in rows])
    assert agree(Statistics.open(tmp_path / NAME), expected) >= 12


@pytest.mark.slow
@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_collect_encoder_decoder_has_moments_of_pytorch(name: str, tmp_path: Path) -> None:
    model = save(DYNAMO[name], tmp_path / "model")
    done = export(model, tmp_path / "onnx", ExportOptions("fp32", "cpu"), progress=Silent())
    text = tmp_path / "pairs.txt"
    text.write_text("\n".join(f"{line[:40]}\t{line[::-1][:30]}" for line in LINES) + "\nno target\n")
    graphs = [done.output / graph for graph in done.graphs]
    made = collect(graphs, model, text, tmp_path / NAME, progress=Silent())
    assert made.windows == 5
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    whole = getattr(transformers, name).from_pretrained(model, dtype=torch.float32)
    first = [whole.config.decoder_start_token_id]

    def run() -> None:
        for line in text.read_text().splitlines():
            source, _, target = line.partition("\t")
            ids, written = tokenizer(source)["input_ids"], tokenizer(target or source)["input_ids"]
            given = torch.tensor([first + written[:-1]])
            whole(input_ids=torch.tensor([ids]), decoder_input_ids=given)

    statistics = Statistics.open(tmp_path / NAME)
    expected = seen_by(whole, run)
    assert agree(statistics, expected) >= 30
    cross = {"T": "decoder.block.0.layer.1.EncDecAttention.k", "B": "model.decoder.layers.0.encoder_attn.k_proj"}
    assert of_tensor(statistics, f"{cross[name[0]]}.weight") is not None


def test_collect_gives_the_same_bytes_wherever_the_graph_is_cut(
    llama: Path, exported: Callable[..., ExportResult], text: Path, tmp_path: Path
) -> None:
    graph = [exported(llama).output / "model.onnx"]
    for at, limit in enumerate((SEGMENT, SEGMENT, 100_000, SEGMENTS_OF_ONE_NODE)):
        collect(graph, llama, text, tmp_path / str(at), limit=limit, progress=Silent())
    once, again, *cut = [(tmp_path / str(at)).read_bytes() for at in range(4)]
    assert once == again and cut == [once, once]
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["0", "1", "2", "3", "texts.txt"]


def test_segments_cut_where_the_limit_says_and_fewest_values_live(
    llama: Path, exported: Callable[..., ExportResult]
) -> None:
    path = exported(llama).output / "model.onnx"
    model = open_model(path)
    wanted = dict.fromkeys(
        [v for i in inputs_of(model, weights_map.read(path.parent).weights) for v in i.values], 0
    )
    sizes = {n: len(segments_of(model, wanted, limit, path)) for n, limit in (("all", SEGMENT), ("half", 100_000))}
    assert sizes["all"] == 3  # what comes before the embeddings, the embeddings, the layers
    segments = segments_of(model, wanted, 100_000, path)
    weights = [_bytes_of_weights(segment.nodes) for segment in segments if segment.lookup is None]
    assert sizes["half"] > 3 and max(weights) <= 100_000 and sum(weights) > 200_000
    assert all(len(segment.inputs) <= 6 for segment in segments)


def _bytes_of_weights(nodes: Sequence[ir.Node]) -> int:
    tensors = [v.const_value for n in nodes for v in n.inputs if v is not None]
    return sum(t.nbytes for t in tensors if isinstance(t, ir.ExternalTensor))


def test_collect_layer_that_runs_twice_has_the_mean_of_both(tmp_path: Path) -> None:
    """One weight reads two values (as in ALBERT); another reads only the second."""
    random = np.random.default_rng(3)
    weights = {n: random.standard_normal((70, 70), np.float32) for n in ("shared", "own")}
    _save_graph(
        tmp_path,
        weights,
        "h = MatMul(x, shared) g = Tanh(h) i = MatMul(g, shared) j = MatMul(g, own) y = Add(i, j)",
    )
    x = random.standard_normal((2, 150, 70), np.float32)
    g = np.tanh(x @ weights["shared"])
    model = open_model(tmp_path / "model.onnx")
    wanted = inputs_of(model, weights_map.read(tmp_path).weights)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    run = moments(tmp_path / "model.onnx", [{"x": x}], wanted, scratch=scratch, longest=150, progress=Silent())
    found = {m.inputs.weights[0].name: m for m in run}
    of_x, of_g = (np.einsum("bti,btj->ij", v, v) for v in (x, g))
    assert {n: m.tokens for n, m in found.items()} == {"shared": 600, "own": 300}
    for name, expected in (("shared", (of_x + of_g) / 600), ("own", of_g / 300)):
        assert np.allclose(np.triu(found[name].matrix), np.triu(expected), rtol=1e-4, atol=1e-5)


def _save_graph(folder: Path, weights: dict[str, Array], nodes: str, inputs: str = "float[b, t, 70] x") -> None:
    """A graph with its weights beside it, each made of a tensor of its own name."""
    inputs = ", ".join([inputs, *(f"float{list(value.shape)} {name}" for name, value in weights.items())])
    text = f'<ir_version: 8, opset_import: ["" : 18]> g ({inputs}) => (float[b, t, 70] y) {{ {nodes} }}'
    model = ir.from_onnx_text(text)
    for at, node in enumerate(model.graph):
        node.name = str(at)
    entries = []
    for name, value in weights.items():
        recipe = Recipe((Piece(f"{name}.weight", 0, value.shape[0]),))
        entries.append(Weight(name, "model.data", "float32", value.shape, recipe))
    placed = weights_map.placed(entries)
    with (folder / "model.data").open("wb") as file:
        for weight in placed:
            file.seek(weight.offset)
            file.write(weights[weight.name].tobytes())
    _with_initializers(model, placed)
    (folder / "model.onnx").write_bytes(serialized(model))
    weights_map.write(folder, WeightsMap(placed))


def _with_initializers(model: ir.Model, placed: Sequence[Weight]) -> None:
    tensors = {
        w.name: ir.ExternalTensor(
            w.file, w.offset, w.nbytes, ir.DataType.FLOAT, shape=ir.Shape(w.shape), name=w.name
        )
        for w in placed
    }
    for value in list(model.graph.inputs):
        if value.name in tensors:
            value.const_value = tensors[value.name]
            model.graph.inputs.remove(value)
            model.graph.register_initializer(value)


# --- the file ----------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, Array, Recipe]:
    """A file with one matrix, of which one input is always zero, for two weights."""
    rows = np.random.default_rng(0).standard_normal((40, 9)).astype(np.float32) * np.logspace(
        -3, 3, 9, dtype=np.float32
    )
    rows[:, 4] = 0
    matrix = (rows.T @ rows / 40).astype(np.float32)
    weights = tuple(Weight(n, "d", "float32", (9, 3), Recipe((Piece(n, 0, 3),), True)) for n in ("b", "a"))
    file = packed(tmp_path)
    file.add(Moment(Inputs(("x",), weights, 9), matrix, 40))
    file.write(tmp_path / NAME, CalibrationRecord("0" * 64, 40, 2))
    return tmp_path / NAME, matrix, weights[0].recipe


def test_statistics_matrix_comes_back_within_a_half(written: tuple[Path, Array, Recipe]) -> None:
    path, matrix, recipe = written
    statistics = Statistics.open(path)
    assert statistics.calibration == CalibrationRecord("0" * 64, 40, 2)
    assert statistics.key(recipe) == statistics.key(Recipe((Piece("a", 0, 3),))) == "a[0:3]"
    assert statistics.moment(Recipe((Piece("a", 0, 2),))) is None and statistics.moment(Recipe()) is None
    found = statistics.moment(recipe)
    assert found is not None and found.dtype == np.float64 and (found == found.T).all()
    assert np.array_equal(found.diagonal(), matrix.diagonal()) and not found[4].any()
    root = np.sqrt(matrix.diagonal().astype(np.float64))
    assert (np.abs(found - matrix) <= 5e-4 * np.outer(root, root)).all()


def _rewritten(path: Path, change: Callable[[dict[str, str], dict[str, np.ndarray]], None]) -> None:
    header = read_header(path)
    raw, metadata = path.read_bytes(), dict(header.metadata)
    types = {"F32": np.float32, "F16": np.float16}
    arrays = {n: np.frombuffer(raw[t.start : t.end], types[t.dtype]).copy() for n, t in header.tensors.items()}
    change(metadata, arrays)
    names = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16"}
    described = [(n, names[a.dtype], a.shape) for n, a in arrays.items()]
    path.write_bytes(build_header(described, metadata) + b"".join(a.tobytes() for a in arrays.values()))


def _set(part: str, key: str, value: Any) -> Callable[[dict[str, str], dict[str, np.ndarray]], None]:
    def change(metadata: dict[str, str], arrays: dict[str, np.ndarray]) -> None:
        {"metadata": metadata, "arrays": arrays}[part][key] = value

    return change


def _entry(key: str, at: int, value: float) -> Callable[[dict[str, str], dict[str, np.ndarray]], None]:
    def change(_: dict[str, str], arrays: dict[str, np.ndarray]) -> None:
        arrays[key][at] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set("metadata", "schema_version", "2"), "schema_version '2'"),
        (_set("metadata", "tokens", "many"), "no numbers or names"),
        (_set("metadata", "tokens", "0"), "no hash, or no tokens"),
        (_set("metadata", "windows", "true"), "windows"),
        (_set("metadata", "text_sha256", "g" * 64), "no hash"),
        (_set("metadata", "pieces", '{"a[0:3]": "c"}'), "a matrix that is not there"),
        (_set("metadata", "pieces", '{"a[0:3]": 7}'), "pieces"),
        (_set("metadata", "pieces", "[]"), "pieces"),
        (_set("arrays", "a[0:3].diagonal", np.zeros(8, np.float32)), "a diagonal and a triangle of"),
        (_set("arrays", "a[0:3].diagonal", np.zeros((3, 3), np.float32)), "a diagonal and a triangle of"),
        (_set("arrays", "a[0:3].triangle", np.zeros(45, np.float32)), "F32 and F32"),
        (_entry("a[0:3].diagonal", 2, np.nan), "numbers that no mean of squares has"),
        (_entry("a[0:3].diagonal", 2, -1.0), "numbers that no mean of squares has"),
        (_entry("a[0:3].triangle", 3, np.nan), "numbers that no mean of squares has"),
        (_entry("a[0:3].triangle", 3, 1.01), "numbers that no mean of squares has"),
    ],
)
def test_statistics_damaged_file_is_refused(
    change: Callable[[dict[str, str], dict[str, np.ndarray]], None], said: str, written: tuple[Path, Array, Recipe]
) -> None:
    path, _, recipe = written
    _rewritten(path, lambda metadata, arrays: None)
    assert Statistics.open(path).moment(recipe) is not None
    _rewritten(path, change)
    with pytest.raises(InputError, match=said):
        Statistics.open(path).moment(recipe)


def test_statistics_file_that_is_cut_or_a_link_is_refused(
    written: tuple[Path, Array, Recipe], tmp_path: Path
) -> None:
    path, _, _ = written
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(InputError, match="missing or a link"):
        Statistics.open(tmp_path / "link")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(LoraExportError, match="is cut off"):
        Statistics.open(path)


# --- texts -------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer with a token a letter, <s> = 1 before and </s> = 2 behind a text."""

    def __call__(self, text: str, add_special_tokens: bool = True, max_length: int = 10**9, **_: Any) -> Any:
        ids = [ord(c) for c in text]
        return {"input_ids": [1, *ids[: max_length - 2], 2] if add_special_tokens else ids}


def test_windows_are_whole_and_taken_at_even_distances() -> None:
    rows = Rows(Letters(), 5, None)
    text = "".join(chr(100 + i) for i in range(40))  # ten windows of four letters behind <s>
    every = rows.windows(text, 1000)
    assert len(every) == 10 and all(len(w) == 5 and w[0] == 1 for w in every)
    assert [i for w in every for i in w[1:]] == [ord(c) for c in text]
    assert rows.windows(text, 17) == [every[i] for i in (0, 3, 6)]
    assert rows.windows(text, 3) == [[1, 100, 101]]
    assert Rows(Letters(), 5, 110).windows(text, 1000) == [*every[:2], [1, 108, 109]]


def test_windows_of_a_long_text_are_tokenized_alone() -> None:
    rows = Rows(Letters(), 5, None)
    text = "".join(chr(100 + i // 1000) for i in range(40_000))
    found = rows.windows(text, 20)
    assert [w[1:] for w in found] == [[100 + i] * 4 for i in (0, 10, 20, 30)]


def test_texts_and_pairs_are_spread_over_the_lines() -> None:
    rows = Rows(Letters(), 6, None)
    lines = ["abc", "de", "fghijk", "l", "mn"]
    assert [len(r) for r in rows.texts(lines, 1000)] == [5, 4, 6, 3, 4]
    assert rows.texts(lines, 12) == [rows.texts(lines, 1000)[0], rows.texts(lines, 1000)[2]]
    assert rows.texts(lines, 1) == rows.texts(lines, 1000)[:1]
    assert rows.pairs(["ab\tcd", "e"], 7, 1000) == [([1, 97, 98, 2], [7, 1, 99, 100]), ([1, 101, 2], [7, 1, 101])]


def test_built_in_text_is_none_that_models_are_judged_on() -> None:
    def runs(text: str) -> set[str]:
        words = text.split()
        return {" ".join(words[i : i + 5]) for i in range(len(words) - 4)}

    judged = runs(RUNNING_TEXT.read_text()).union(*map(runs, PROMPTS))
    own = calibration.read(None)
    assert own.path == BUILT_IN and len(own.text) > 8000 and not runs(own.text) & judged
    assert len(own.sha256) == 64 and len(own.lines) > 50


@pytest.mark.parametrize(("content", "said"), [(b" \n\n", "no texts"), (b"\xff\xfe", "cannot be read")])
def test_calibration_file_without_text_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(InputError, match=said):
        calibration.read(tmp_path / "t.txt")


# --- what waits between segments ---------------------------------------------------------------------------


def test_shelf_keeps_what_exceeds_its_limit_on_disk(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, limit=100)
    arrays = {name: np.arange(10, dtype=np.float64) + at for at, name in enumerate("abc")}
    for name, array in arrays.items():
        shelf.put(0, name, array)
    assert len(list(tmp_path.iterdir())) == 2
    assert all(np.array_equal(shelf.get(0, name), array) for name, array in arrays.items())
    shelf.drop(0, "a")
    shelf.drop(0, "b")
    shelf.put(1, "a", arrays["a"])
    assert len(list(tmp_path.iterdir())) == 1 and np.array_equal(shelf.get(1, "a"), arrays["a"])


# --- experts, branches, sounds -----------------------------------------------------------------------------


def test_collect_names_products_that_too_few_tokens_reach(tmp_path: Path) -> None:
    """Twelve rows reach `few`, none `none`, all of them `all`."""
    weights = {n: np.ones((70, 70), np.float32) for n in ("few", "none", "all")}
    nodes = """
        from = Constant <value_ints: ints = [0]> () few_end = Constant <value_ints: ints = [3]> ()
        axis = Constant <value_ints: ints = [1]> ()
        some = Slice(x, from, few_end, axis) empty = Slice(x, from, from, axis)
        a = MatMul(some, few) b = MatMul(empty, none) c = MatMul(x, all)
        d = Concat <axis = 1> (a, b) y = Concat <axis = 1> (c, d)
    """
    _save_graph(tmp_path, weights, nodes)
    feeds = [{"x": np.ones((1, 100, 70), np.float32)}] * 4
    folders = [tmp_path / name for name in ("packed", "values")]
    for folder in folders:
        folder.mkdir()
    file, said = packed(folders[0]), Details()
    stage = Stage(tmp_path / "model.onnx", feeds, 400, 100)
    gather(stage, weights_map.read(tmp_path).weights, (), file, folders[1], SEGMENT, said)
    file.write(tmp_path / NAME, CalibrationRecord("0" * 64, 400, 4))
    assert list(Statistics.open(tmp_path / NAME).names) == ["all.weight[0:70]"]
    assert [text.partition(":")[0] for text in said.said] == ["few", "none"]
    gather(replace(stage, tokens=12), weights_map.read(tmp_path).weights, ["few"], file, folders[1], SEGMENT, said)
    assert [text.partition(":")[0] for text in said.said[2:]] == ["none"]


def test_moments_node_with_branches_reads_what_segments_made(tmp_path: Path) -> None:
    weights = {n: np.full((70, 70), at + 1, np.float32) / 70 for at, n in enumerate(("one", "two"))}
    nodes = """
        h = MatMul(x, one) n = ReduceSum <keepdims = 0> (h) yes = Greater(n, n)
        g = If (yes) <then_branch = t () => (float[b, t, 70] p) { p = Neg(h) },
                      else_branch = e () => (float[b, t, 70] q) { q = Tanh(h) }>
        y = MatMul(g, two)
    """
    _save_graph(tmp_path, weights, nodes)
    x = np.random.default_rng(0).standard_normal((1, 90, 70), np.float32)
    wanted = inputs_of(open_model(tmp_path / "model.onnx"), weights_map.read(tmp_path).weights)
    for limit in (SEGMENT, SEGMENTS_OF_ONE_NODE):
        scratch = tmp_path / str(limit)
        scratch.mkdir()
        run = moments(
            tmp_path / "model.onnx", [{"x": x}], wanted,
            scratch=scratch, longest=90, limit=limit, progress=Silent(),
        )  # fmt: skip
        found = {m.inputs.weights[0].name: m.matrix for m in run}
        g = np.tanh(x[0] @ weights["one"])
        assert np.allclose(np.triu(found["two"]), np.triu(g.T @ g / 90), rtol=1e-4, atol=1e-6)


def _save_clip(path: Path, rate: int = 16_000, seconds: int = 1, words: str = "the words") -> None:
    noise = np.random.default_rng(seconds).integers(-9000, 9000, (rate * seconds, 2)).astype("<i2")
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(2)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes(noise.tobytes())
    path.with_suffix(".txt").write_text(words)


def test_clips_are_read_as_one_channel_with_their_words(tmp_path: Path) -> None:
    _save_clip(tmp_path / "b.wav", seconds=2)
    _save_clip(tmp_path / "a.wav")
    read = speech.read(tmp_path)
    assert [(c.path.name, len(c.samples), c.rate, c.transcript) for c in read.clips] == [
        ("a.wav", 16_000, 16_000, "the words"), ("b.wav", 32_000, 16_000, "the words")
    ]  # fmt: skip
    assert 0.1 < np.abs(read.clips[0].samples).max() < 1
    _save_clip(tmp_path / "b.wav", seconds=2, words="other words")
    assert speech.read(tmp_path).sha256 != read.sha256


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "a.wav").unlink(), "no .wav file"),
        (lambda folder: (folder / "a.txt").unlink(), "no transcript"),
        (lambda folder: (folder / "a.txt").write_text(" \n"), "0 characters of text"),
        (lambda folder: (folder / "a.wav").write_bytes(b"RIFF"), "cannot be read"),
    ],
)
def test_clips_that_are_not_whole_are_refused(change: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    _save_clip(tmp_path / "a.wav")
    change(tmp_path)
    with pytest.raises(InputError, match=said):
        speech.read(tmp_path)


@pytest.mark.slow
def test_collect_whisper_has_moments_of_pytorch(tmp_path: Path) -> None:
    model = save(GENAI["WhisperForConditionalGeneration"], tmp_path / "model")
    whole = transformers.WhisperForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    frames = 2 * whole.config.max_source_positions
    extractor = transformers.WhisperFeatureExtractor(
        feature_size=whole.config.num_mel_bins, chunk_length=frames // 100 or 1
    )
    extractor.nb_max_frames, extractor.n_samples = frames, frames * extractor.hop_length
    extractor.save_pretrained(model)
    done = export(model, tmp_path / "onnx", ExportOptions("fp32", "cpu"), progress=Silent())
    clips = tmp_path / "clips"
    clips.mkdir()
    for at in range(3):
        _save_clip(clips / f"{at}.wav", words="abc de" * (at + 1))
    graphs = [done.output / graph for graph in done.graphs]
    made = collect(graphs, model, clips, tmp_path / NAME, progress=Silent())
    with pytest.raises(ExportError, match="nothing for a graph that reads"):
        collect(graphs, model, None, tmp_path / "none", progress=Silent())
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    read, first = speech.read(clips), whole.config.decoder_start_token_id
    rows = [[first, *tokenizer(clip.transcript)["input_ids"]][:-1] for clip in read.clips]
    assert (made.windows, made.tokens, made.text_sha256) == (3, sum(map(len, rows)), read.sha256)

    def run() -> None:
        for given, ids in zip(speech.heard(model, read), rows, strict=True):
            features = torch.tensor(given["input_features"])
            whole(input_features=features, decoder_input_ids=torch.tensor([ids]))

    assert agree(Statistics.open(tmp_path / NAME), seen_by(whole, run)) >= 24


@pytest.mark.slow
def test_collect_experts_see_their_share_of_tokens(tmp_path: Path) -> None:
    """Of the rows that a router sends on, each goes to `k` experts: their sums make up k times the router's own."""
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    whole = Row("MixtralForCausalLM", sizes).save(tmp_path / "model")
    options = ExportOptions("fp32", "cpu", "dynamo")
    done = export(tmp_path / "model", tmp_path / "onnx", options, progress=Silent())
    text, rows = calibration.read(None), Rows.of(tmp_path / "model")
    ids = rows.windows(text.text, 2000)
    stage, *_ = stages([done.model], tmp_path / "model", text, 2000, tmp_path)[0]
    wanted = inputs_of(open_model(done.model), weights_map.read(done.output).weights)
    (tmp_path / "scratch").mkdir()
    found: dict[str, Any] = {}
    for m in moments(done.model, stage.feeds, wanted, scratch=tmp_path / "scratch", longest=64, progress=Silent()):
        if "layers.1.mlp.experts.gate_up_proj" in m.inputs.weights[0].name:
            found[m.inputs.weights[0].name] = (m.tokens, m.matrix * m.tokens)
    sums: list[Any] = []

    def seen(_: Any, given: Any) -> None:
        sums.append(given[0].reshape(-1, 64).double())

    whole.model.layers[1].mlp.register_forward_pre_hook(seen)
    with torch.no_grad():
        for row in ids:
            whole(torch.tensor([row]))
    routed = torch.cat(sums)
    each = whole.config.num_experts_per_tok
    assert sum(tokens for tokens, _ in found.values()) == each * len(routed) and len(found) == 4
    total = np.triu(sum(matrix for _, matrix in found.values()))
    expected = np.triu(each * (routed.T @ routed).numpy())
    assert np.allclose(total, expected, rtol=1e-4, atol=1e-5 * expected.max())
