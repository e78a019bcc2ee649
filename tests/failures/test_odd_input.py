"""Input that tests/fuzz found to end in something else than a refusal. One case each, as small as it was shrunk."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import save

from lora_export.checkpoint import open_checkpoint
from lora_export.checkpoint.header import read_header
from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.errors import AdapterError, LoraExportError, plain
from lora_export.merging import MergePlan, plan
from lora_export.merging.architecture.model import loaded_weights
from lora_export.onnx_export import check_model, load_export
from lora_export.quantization import find_quantized
from lora_export.report import render
from lora_export.workflows.inspection import inspect_folder
from tests.builders import edit_json
from tests.fuzz import adapters, test_fuzz_adapters, test_fuzz_quantization
from tests.fuzz.files import Entry, entries, file_bytes
from tests.fuzz.guard import attempt
from tests.fuzz.test_fuzz_runs import MANIFEST, REPORT, SAMPLES, write_run

ENDLESS = r"(([a-z]|[.\w])+)+[!?]"  # twice as long for each letter of a name
UP, CONV, EXPERTS = (f"base_model.model.{n}" for n in (adapters.UP, adapters.CONV, adapters.EXPERTS))

TOKENS = "base_model.model.model.embed_tokens.token_adapter"


def refused(folder: Path, call: Callable[[], Any], said: str = "") -> LoraExportError:
    """The refusal of a call, which came soon and in little memory."""
    outcome = attempt(folder, call)
    assert isinstance(outcome, LoraExportError), f"accepted: {outcome}"
    assert said in outcome.message()
    return outcome


# --- words -------------------------------------------------------------------------------------------------


def test_error_text_is_printable_and_fits_screen() -> None:
    assert plain("a\x1b[31m\nb\ud800é") == "a\\x1b[31m\\nb\\ud800é"
    error = LoraExportError("x" * 10**6, tensor="w\n  try:      rm -rf /")
    assert len(error.message()) < 3000
    assert error.message().count("\n") == 1 and error.tensor == "w\\n  try:      rm -rf /"


# --- headers and indexes -----------------------------------------------------------------------------------


def header(folder: Path, entries_: dict[str, Any], data: bytes = b"") -> Path:
    text = json.dumps(entries_).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


BYTE = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}


@pytest.mark.parametrize("entries_", [{"\ud800": BYTE}, {"w": BYTE, "__metadata__": {"a": "\ud800"}}])
def test_header_with_lone_surrogate_is_refused(tmp_path: Path, entries_: dict[str, Any]) -> None:
    path = header(tmp_path, entries_, b"x")
    refused(tmp_path, lambda: read_header(path))


def test_config_pattern_with_pathological_name_is_refused(tmp_path: Path) -> None:
    path = header(tmp_path, {f"layers.{'9' * 5000}.w": BYTE}, b"x")
    refused(tmp_path, lambda: read_header(path), "a name of 5009 characters")


def test_header_missing_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, lambda: read_header(tmp_path / "model.safetensors"), "cannot be read")


def base(folder: Path, **config: Any) -> Path:
    made = adapters.base(folder)
    edit_json(made / "config.json", **config)
    return made


def test_index_with_impossible_file_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"a": "x" * 300 + ".safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, lambda: open_checkpoint(tmp_path), "which is not there")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architectures": {"0": "LlamaForCausalLM"}}, "architectures is an object"),
        ({"architectures": [7]}, "architectures[0] is an integer"),
        ({"quantization_config": ["gptq"]}, "quantization_config is an array"),
        ({"x": "\ud800"}, "not a Unicode string"),
        ({"x": json.loads("[" * 100 + "]" * 100)}, "more than 64 levels"),
    ],
)
def test_base_config_of_wrong_types_is_refused(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    folder = base(tmp_path / "base", **config)
    refused(tmp_path, lambda: open_checkpoint(folder), said)
    refused(tmp_path, lambda: inspect_folder(folder), said)


@pytest.mark.parametrize(
    "config",
    [
        {"hidden_size": "4"}, {"num_attention_heads": 0}, {"num_hidden_layers": 10**9}, {"head_dim": 2**40},
        {"rope_parameters": 3},
    ],
)  # fmt: skip
def test_base_config_that_transformers_rejects_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    """No conversions are known then, which is no failure of its own."""
    sound = open_checkpoint(base(tmp_path / "sound"))
    assert loaded_weights(sound, adapters.BASE)  # imports transformers, which takes long
    checkpoint = open_checkpoint(base(tmp_path / "base", **config))
    assert not isinstance(attempt(tmp_path, lambda: loaded_weights(checkpoint, adapters.BASE)), LoraExportError)


# --- adapters ----------------------------------------------------------------------------------------------


def adapter(
    tmp_path: Path, kind: str, tensors: dict[str, tuple[int, ...] | None] | None = None, **config: Any
) -> Callable[[], MergePlan]:
    """The plan for an adapter of tests/fuzz with some settings and shapes changed (None: left out), carried out."""
    made = adapters.tensors(kind)
    shapes = {n: tuple(t.shape) for n, t in made.items()} | (tensors or {})
    found = [Entry(n, "F32", s, b"") for n, s in shapes.items() if s is not None]
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(adapters.KINDS[kind][0] | config))
    (folder / "adapter_model.safetensors").write_bytes(file_bytes(found))
    base_folder = adapters.base(tmp_path / "base")

    def planned() -> MergePlan:
        found = plan(base_folder, [AdapterChoice(folder)], MergeOptions())
        for tensor in found.tensors.values():
            for update in tensor.updates:
                update.load(tensor.shape).apply(torch.ones(tensor.shape), slice(0, tensor.shape[0]))
        return found

    return planned


@pytest.mark.parametrize(
    ("kind", "config", "said"),
    [
        ("lora", {"modules_to_save": True}, "modules_to_save is True"),
        ("saved", {"modules_to_save": ["norm", 1]}, "modules_to_save is ['norm', 1]"),
        ("saved", {"modules_to_save": "norm"}, "modules_to_save is 'norm'"),
        ("lora", {"target_parameters": 3}, "target_parameters is 3"),
        ("experts", {"lora_B_layout": ["rank_major"]}, "lora_B_layout is ['rank_major']"),
        ("lora", {"lora_alpha": 10**400}, "lora_alpha"),
        ("lora", {"lora_alpha": 4e38}, "lora_alpha"),
        ("lora", {"alpha_pattern": {"up_proj": float("inf")}}, "alpha_pattern"),
        ("experts", {"rank_pattern": {".*": 0.5}}, "rank_pattern"),
        ("loha", {"rank_pattern": {".*": 2.5}}, "rank_pattern"),
        ("lora", {"rank_pattern": {"(?i)x": 3}}, "global flags not at the start"),
        ("lora", {"rank_pattern": {"(" * 2000 + ")" * 2000: 3}}, "rank_pattern has the key"),
        ("lora", {"rank_pattern": {"a{99999999999999999999}": 3}}, "rank_pattern has the key"),
        ("lora", {"rank_pattern": {ENDLESS: 3}}, "takes too long to match"),
        ("ia3 feedforward", {"feedforward_modules": "("}, "feedforward_modules"),
        ("ia3 feedforward", {"feedforward_modules": ENDLESS}, "takes too long to match"),
        ("replicated", {"layer_replication": [[0, 10**9]]}, "1000000000 layers"),
        ("oft", {"num_cayley_neumann_terms": 10**9}, "num_cayley_neumann_terms is 1000000000"),
        ("oft", {"peft_version": "9" * 5000}, "peft_version"),
        ("lora", {"x": "\ud800"}, "not a Unicode string"),
        ("lora", {"x": json.loads("[" * 100 + "]" * 100)}, "more than 64 levels"),
    ],
)
def test_adapter_config_of_wrong_types_is_refused(
    tmp_path: Path, kind: str, config: dict[str, Any], said: str
) -> None:
    refused(tmp_path, adapter(tmp_path, kind, **config), said)


@pytest.mark.parametrize(
    ("kind", "tensors", "config", "said"),
    [
        ("lora", {f"{CONV}.lora_B.bias": (6,)}, {}, "without lora_B"),
        (
            "tokens",
            {f"{'base_model.model.model.embed_tokens'}.token_adapter.trainable_tokens_delta": (2,)},
            {},
            "[2]",
        ),
        ("adalora", {f"{UP}.lora_E": ()}, {}, "the shape is []"),
        ("loha", {f"{UP}.hada_w1_b": (2,)}, {}, "the shape is [2]"),
        ("loha", {f"{UP}.hada_w2_b": (2, 5)}, {}, "hada_w2_b [2, 5]"),
        ("loha", {f"{CONV}.hada_t1": (2, 2, 9)}, {}, "hada_t1 [2, 2, 9]"),
        ("loha", {f"{CONV}.hada_t1": (2, 3, 3, 3), f"{CONV}.hada_t2": (2, 3, 3, 3)}, {}, "[2, 3, 3, 3]"),
        ("lokr", {f"{UP}.lokr_w1": ()}, {}, "the shape is []"),
        ("lokr", {f"{UP}.lokr_w2_a": (3,)}, {}, "the shape is [3]"),
        ("lokr", {f"{CONV}.lokr_t2": (3, 2, 3, 3)}, {}, "the shape is [3, 2, 3, 3]"),
        ("lora convolution", {f"{CONV}.lora_B.weight": (6, 0, 1, 1)}, {}, "[6, 0, 1, 1]"),
        ("stacked", {f"{EXPERTS}.w1.lora_A": (2**62, 0, 4)}, {}, "no tensor has the shape"),
        ("ia3 feedforward", {f"{CONV}.ia3_l": (1, 28, 1, 1)}, {}, "7 groups"),
        ("boft", {f"{UP}.boft_R": (15_000, 3, 1, 1)}, {"boft_n_butterfly_factor": 15_000}, "interleaved"),
    ],
)
def test_adapter_tensors_of_wrong_shapes_are_refused(
    tmp_path: Path, kind: str, tensors: dict[str, tuple[int, ...] | None], config: dict[str, Any], said: str
) -> None:
    refused(tmp_path, adapter(tmp_path, kind, tensors, **config), said)


def test_layer_replication_of_missing_layer_is_refused(tmp_path: Path) -> None:
    planned = adapter(tmp_path, "replicated", layer_replication=[[0, 3]])
    for path in tmp_path.glob("base/model.safetensors"):
        tensors = {n.replace("layers.1.", "layers.2."): torch.ones(s) for n, s in adapters.BASE.items()}
        path.write_bytes(save(tensors))
    refused(tmp_path, planned, "names the layer 1")


def test_layer_replication_with_short_list_is_refused(tmp_path: Path) -> None:
    planned = adapter(tmp_path, "replicated")
    edit_json(tmp_path / "base" / "config.json", num_hidden_layers=1, layer_types=["full_attention"])
    found = attempt(tmp_path, planned)
    assert isinstance(found, MergePlan) and found.config_changes == {"num_hidden_layers": 4}


# --- quantized bases ---------------------------------------------------------------------------------------


def change(name: str, **changes: Any) -> Callable[[list[Entry]], list[Entry]]:
    return lambda found: [replace(e, **changes) if e.name == name else e for e in found]


def state(**changes: Any) -> Callable[[list[Entry]], list[Entry]]:
    def spoil(found: list[Entry]) -> list[Entry]:
        old = next(e for e in found if e.name == test_fuzz_quantization.STATE)
        data = json.dumps(json.loads(old.data) | changes).encode()
        return change(old.name, data=data, shape=(len(data),))(found)

    return spoil


@pytest.mark.parametrize(
    ("name", "spoil", "settings", "said"),
    [
        ("bnb4", change(test_fuzz_quantization.STATE, dtype="F32", shape=(2,)), {}, "of type F32"),
        ("bnb4", change(test_fuzz_quantization.STATE, data=b"[" * 3000, shape=(3000,)), {}, "not JSON"),
        ("bnb4", change(test_fuzz_quantization.STATE, data=b" ", shape=(70_000,)), {}, "70000 bytes"),
        ("bnb4", state(shape=[True, 300]), {}, "shape[0] is a boolean"),
        ("bnb4 double", change("w.weight.absmax", dtype="F32"), {}, "the type is F32"),
        ("bnb8", change("w.weight_format", shape=(0,)), {}, "[0]"),
        ("bnb8", change("w.weight_format", dtype="F32", data=b"\0\0\xc0\x7f"), {}, "F32"),
        ("gptq", change("w.qweight", shape=(64,)), {}, "the shape is [64]"),
        ("awq", change("w.qweight", shape=(128,)), {}, "the shape is [128]"),
        ("fp8", None, {"weight_block_size": [16]}, "weight_block_size"),
        ("fp8", None, {"weight_block_size": "16"}, "weight_block_size is a string"),
        ("fp8", None, {"weight_block_size": {"0": 16}}, "weight_block_size is an object"),
        ("packed", change("w.weight_shape", shape=(1,)), {}, "the shape is [1]"),
        ("packed", change("w.weight_shape", shape=()), {}, "the shape is []"),
        ("packed", change("w.weight_g_idx", data=b"\x09"), {}, "beyond the 2 there are"),
        ("packed", None, {"config_groups": [1]}, "config_groups is an array"),
        ("packed", None, {"config_groups": {"a": 1}}, "config_groups[...] is an integer"),
        ("packed", None, {"format": ["pack-quantized"]}, "format is an array"),
        ("packed", None, {"sparsity_config": 1}, "sparsity_config is an integer"),
        (
            "plain",
            None,
            {"config_groups": {"a": {"weights": {"block_structure": [None, 1]}}}},
            "block_structure[0]",
        ),
    ],
)
def test_quantized_base_of_wrong_types_is_refused(
    tmp_path: Path, name: str, spoil: Callable[[list[Entry]], list[Entry]] | None, settings: Any, said: str
) -> None:
    tensors, sound = test_fuzz_quantization.BASES[name]
    found = spoil(list(tensors)) if spoil else list(tensors)
    config = {"quantization_config": sound | settings, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(file_bytes(found))

    def read() -> None:
        checkpoint = open_checkpoint(tmp_path)
        for weight in find_quantized(checkpoint, checkpoint.config).values():
            weight.load(checkpoint).rows(0, weight.shape[0])

    refused(tmp_path, read, said)


def test_compressed_block_structure_without_use_is_ignored(tmp_path: Path) -> None:
    tensors, settings = test_fuzz_quantization.BASES["plain"]
    group = {"weights": {"block_structure": [0, 16]}}
    spoiled = settings | {"config_groups": {"a": group, **settings["config_groups"]}, "sparsity_config": None}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": spoiled}))
    (tmp_path / "model.safetensors").write_bytes(file_bytes(tensors))
    checkpoint = open_checkpoint(tmp_path)
    assert list(find_quantized(checkpoint, checkpoint.config)) == ["w.weight"]


@pytest.mark.parametrize("shape", [(16, 1), (4, 4), (1, 16)])
def test_code_book_of_other_shape_is_accepted(tmp_path: Path, shape: tuple[int, ...]) -> None:
    read = []
    for place, spoil in (("as", None), ("other", change("w.weight.quant_map", shape=shape))):
        folder = tmp_path / place
        folder.mkdir()
        tensors, settings = test_fuzz_quantization.BASES["bnb4"]
        (folder / "config.json").write_text(json.dumps({"quantization_config": settings, "dtype": "bfloat16"}))
        (folder / "model.safetensors").write_bytes(file_bytes(spoil(list(tensors)) if spoil else list(tensors)))
        checkpoint = open_checkpoint(folder)
        (weight,) = find_quantized(checkpoint, checkpoint.config).values()
        read.append(weight.load(checkpoint).rows(0, weight.shape[0]))
    assert torch.equal(*read)


def test_weight_under_two_names_is_refused(tmp_path: Path) -> None:
    """A change of prefix brings both to it."""
    found = {k: v for k, v in adapters.tensors("lora").items() if "mlp.up_proj" in k}
    found |= {k.replace("base_model.model.", "base_model.layers.", 1): v + 1 for k, v in found.items()}
    result = test_fuzz_adapters.check(adapters.config_bytes("lora"), file_bytes(entries(found)))
    assert isinstance(result, AdapterError) and "under two names" in result.found, result


# --- ONNX --------------------------------------------------------------------------------------------------


def onnx_model(folder: Path, old: bytes, new: bytes) -> Path:
    """A model whose one tensor lies in weights.bin, with some of its bytes replaced by as many."""
    from tests.fuzz.test_fuzz_onnx import BYTES, WEIGHTS

    assert old in BYTES and len(old) == len(new)
    (folder / "weights.bin").write_bytes(WEIGHTS)
    (folder / "model.onnx").write_bytes(BYTES.replace(old, new))
    return folder / "model.onnx"


def test_external_data_with_impossible_name_is_refused(tmp_path: Path) -> None:
    model = onnx.load(onnx_model(tmp_path, b"x", b"x"), load_external_data=False)
    model.graph.initializer[0].external_data[0].value = "x" * 300
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    refused(tmp_path, lambda: check_model(tmp_path / "model.onnx"), "which does not exist")


@pytest.mark.parametrize(
    ("old", "new"), [(b"weights.bin", b"\xffeights.bin"), (b"location", b"\xffocation"), (b"Add", b"\xffdd")]
)
def test_model_text_not_unicode_is_refused(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = onnx_model(tmp_path, old, new)
    refused(tmp_path, lambda: check_model(path), "UTF-8")


@pytest.mark.parametrize(
    "changes", [{"nodes": float("inf")}, {"seconds": 10**400}, {"nodes": "4"}, {"kind": "x"}, {"engine": 3}]
)
def test_export_record_of_wrong_types_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    from tests.fuzz.test_fuzz_onnx import RECORD

    onnx_model(tmp_path, b"x", b"x")
    (tmp_path / "export.json").write_text(json.dumps(RECORD | changes))
    refused(tmp_path, lambda: load_export(tmp_path), "the record of the export")


def test_export_record_not_text_is_refused(tmp_path: Path) -> None:
    from tests.fuzz.test_fuzz_onnx import RECORD

    onnx_model(tmp_path, b"x", b"x")
    (tmp_path / "export.json").write_text(json.dumps(RECORD | {"engine": "\ud800"}))
    refused(tmp_path, lambda: load_export(tmp_path), "not a Unicode string")


# --- runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base": []}, "base is an array"),
        ({"adapters": {"a": 1}}, "adapters is an object"),
        ({"adapters": [1]}, "adapters[0] is an integer"),
        ({"options": None}, "options is null"),
        ({"files": 3}, "files is an integer"),
        ({"files": {"x": {"sha256": "ab"}}}, "files[...] has no field 'size'"),
        ({"files": {"x": {"sha256": "ab", "size": "7"}}}, "files[...].size is a string"),
    ],
)
def test_manifest_of_wrong_types_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    write_run(tmp_path, json.dumps(MANIFEST | changes).encode(), json.dumps(REPORT).encode(), b"{}")
    refused(tmp_path, lambda: inspect_folder(tmp_path), said)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("merge", "tensors", "updated"), "7", "merge.tensors[...] is a string"),
        (("merge", "base_checks"), True, "merge.base_checks is a boolean"),
        (("merge", "delta_survival"), "x", "merge.delta_survival is a string"),
        (("merge", "warnings"), 3, "merge.warnings is an integer"),
        (("export", "files", "x"), None, "export.files[...] is null"),
        (("export", "nodes"), 10**400, "holds an integer that is too large"),
        (("validate", "kl_by_position"), ["1"], "validate.kl_by_position[0] is a string"),
        (("benchmark", "graph_identical"), [], "benchmark.graph_identical is an array"),
        (("benchmark", "environment"), 3, "benchmark.environment is an integer"),
        (("benchmark", "environment", "margin"), 10**400, "holds an integer that is too large"),
        (("sources", "adapters"), 5, "sources.adapters is an integer"),
        (("sources", "base"), "\ud800", "not a Unicode string"),
        (("options", "x"), json.loads("[" * 100 + "]" * 100), "more than 64 levels"),
    ],
)
def test_report_of_wrong_types_is_refused(tmp_path: Path, place: tuple[str, ...], value: Any, said: str) -> None:
    report = json.loads(json.dumps(REPORT))
    holder = report
    for name in place[:-1]:
        holder = holder[name]
    holder[place[-1]] = value
    write_run(tmp_path, json.dumps(MANIFEST).encode(), json.dumps(report).encode(), b"{}")
    refused(tmp_path, lambda: render(tmp_path / "report"), said)
    refused(tmp_path, lambda: inspect_folder(tmp_path), said)


def test_samples_infinite_are_drawn_without_failure(tmp_path: Path) -> None:
    samples = json.dumps({"b1/p128/decode": {"base": [float("inf")]}}).encode()
    write_run(tmp_path, b"{}", json.dumps(REPORT).encode(), samples)
    refused(tmp_path, lambda: render(tmp_path / "report"), "holds inf")


@pytest.mark.parametrize(("margin", "bands"), [(0.01, 1), (-1, 0), (0, 0), (1.5, 0), (None, 0), ("inf", 0)])
def test_report_without_margin_has_no_band(margin: object, bands: int, tmp_path: Path) -> None:
    report = json.loads(json.dumps(REPORT))
    report["benchmark"]["environment"]["margin"] = margin
    write_run(tmp_path, b"{}", json.dumps(report).encode(), json.dumps(SAMPLES).encode())
    render(tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("var(--band)") == page.count("The band is the margin of ±1.0%") == bands
    assert ("±1.0%" in page) == bool(bands)


def test_undamaged_input_is_accepted(tmp_path: Path) -> None:
    """Otherwise the refusals above would prove nothing."""
    assert isinstance(adapter(tmp_path, "lora")(), MergePlan)
    assert entries({"w": torch.ones(1)})[0].shape == (1,)
    (tmp_path / "run").mkdir()
    write_run(
        tmp_path / "run", json.dumps(MANIFEST).encode(), json.dumps(REPORT).encode(), json.dumps(SAMPLES).encode()
    )
    assert inspect_folder(tmp_path / "run")["adapters"] == ["adapter"]
    render(tmp_path / "run" / "report")
