"""What stands on no list is refused, by its name; what transformers, exporters and this tool write is on one."""

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from lora_export.allowed import check_model_folder, check_onnx_folder, check_package, files, hub
from lora_export.allowed.genai_config import check_audio, check_config
from lora_export.allowed.triton_config import check_config as check_triton
from lora_export.errors import CheckpointError, ExportError, InputError
from lora_export.onnx_export.graphs.checks import check_listed

CUDA = {"cuda": {"enable_cuda_graph": "0"}}
GENAI: dict[str, Any] = {
    "model": {
        "bos_token_id": 1,
        "context_length": 256,
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": [CUDA]},
            "filename": "model.onnx",
            "head_size": 16,
            "hidden_size": 64,
            "inputs": {"input_ids": "input_ids", "past_key_names": "past_key_values.%d.key"},
            "outputs": {"logits": "logits", "present_key_names": "present.%d.key"},
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
        },
        "eos_token_id": [2, 3],
        "pad_token_id": 3,
        "type": "llama",
        "vocab_size": 106,
    },
    "search": {"do_sample": True, "temperature": 0.7, "top_k": 13, "max_length": 256},
}


def changed(place: str, value: Any) -> dict[str, Any]:
    """GENAI with a value at a dotted place."""
    document: dict[str, Any] = json.loads(json.dumps(GENAI))
    *path, last = place.split("/")
    holder = document
    for key in path:
        holder = holder.setdefault(key, {})
    holder[last] = value
    return document


def written(folder: Path, name: str, document: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return folder / name


SESSION = "model/decoder/session_options"
PROVIDERS = f"{SESSION}/provider_options"


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (f"{SESSION}/custom_ops_library", "evil.so", "custom_ops_library"),
        (f"{SESSION}/enable_profiling", "/tmp/x", "enable_profiling"),
        (f"{SESSION}/session.model_external_initializers_file_folder_path", "/", "external_initializers"),
        (f"{SESSION}/ep.context_file_path", "x", "ep.context_file_path"),
        (f"{SESSION}/log_id", ["a"], "log_id"),
        (f"{SESSION}/log_severity_level", 2**40, "log_severity_level"),
        (PROVIDERS, [{"QNN": {"backend_path": "libevil.so"}}], "QNN"),
        (PROVIDERS, [{"cuda": {"gpu_external_alloc": "140000"}}], "gpu_external_alloc"),
        (PROVIDERS, [{"cuda": {"user_compute_stream": "140000"}}], "user_compute_stream"),
        (PROVIDERS, [{"cpu": {"x": "y"}}], "cpu.x"),
        (PROVIDERS, {"cuda": {}}, "provider_options"),
        ("model/decoder/run_options", {"enable_profiling": "1"}, "run_options"),
        ("model/decoder/pipeline", [{"a": {"filename": "a.onnx"}}], "pipeline"),
        ("model/decoder/shared_initializers", [{"data_file": "/etc/passwd"}], "shared_initializers"),
        ("model/decoder/filename", "../model.onnx", "filename"),
        ("model/decoder/filename", "/model.onnx", "filename"),
        ("model/decoder/filename", "graph.dat", "filename"),
        ("model/decoder/filename", "model.ort", "filename"),
        ("model/encoder/filename", "model.so", "filename"),
        ("model/encoder/session_options/custom_ops_library", "x", "custom_ops_library"),
        ("model/tokenizer_dir", "/etc", "tokenizer_dir"),
        ("model/vision", {"adapter_filename": "x"}, "vision"),
        ("model/draft/session_options/custom_ops_library", "x", "draft"),
        ("model/vocab_size", float("inf"), "vocab_size"),
        ("search/temperature", float("nan"), "temperature"),
        ("search/do_sample", "yes", "do_sample"),
        ("search/more", 1, "search.more"),
        ("library", "x", "library"),
    ],
)
def test_genai_config_unlisted_key_is_refused(place: str, value: Any, told: str, tmp_path: Path) -> None:
    check_config(written(tmp_path, "genai_config.json", GENAI))
    with pytest.raises(InputError, match=told.replace(".", r"\.")):
        check_config(written(tmp_path, "genai_config.json", changed(place, value)))


@pytest.mark.parametrize("name", ["genai_config.json", "genai_config.cuda.json"])
def test_genai_config_overlays_are_checked_in_every_folder(name: str, tmp_path: Path) -> None:
    written(tmp_path, name, changed(f"{SESSION}/custom_ops_library", "evil.so"))
    for check in (check_onnx_folder, check_package):
        with pytest.raises(InputError, match="custom_ops_library"):
            check(tmp_path)


def test_genai_config_duplicate_key_is_refused(tmp_path: Path) -> None:
    """genai reads both, Python the second alone."""
    evil = json.dumps(changed(f"{SESSION}/custom_ops_library", "evil.so"))
    both = f'{evil[:-1]}, "model": {json.dumps(GENAI["model"])}}}'
    assert json.loads(both) == GENAI
    with pytest.raises(InputError, match="'model' occurs twice"):
        check_config(written(tmp_path, "genai_config.json", both))


def test_genai_config_too_large_or_not_json_is_refused(tmp_path: Path) -> None:
    for text in ("[" * 100_000, "{", "\ufeff{}", '"' + "x" * 2**21 + '"', "[]", "9" * 5000, "nul"):
        with pytest.raises(InputError):
            check_config(written(tmp_path, "genai_config.json", text))


def test_audio_processor_unknown_operation_is_refused(tmp_path: Path) -> None:
    operation = {"name": "x", "type": "STFTNorm", "attrs": {"n_fft": 400, "_comment": [0.0, 0.5]}}
    document = {"feature_extraction": {"sequence": [{"operation": operation}]}}
    check_audio(written(tmp_path, "audio_processor_config.json", document))
    for key, value in {"type": "Library", "attrs": {"path": "/x"}, "domain": "x"}.items():
        wrong = {"feature_extraction": {"sequence": [{"operation": operation | {key: value}}]}}
        with pytest.raises(InputError, match=key):
            check_audio(written(tmp_path, "audio_processor_config.json", wrong))


# --- what transformers reads -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "document", "told"),
    [
        ("config.json", {"attn_implementation": "org/kernel"}, "org/kernel"),
        ("config.json", {"_attn_implementation": "kernels-community/flash-attn3"}, "kernels-community"),
        ("config.json", {"_attn_implementation": {"": "sdpa", "text_config": "org/kernel"}}, "org/kernel"),
        ("config.json", {"text_config": {"attn_implementation": "org/k@main:f"}}, "org/k"),
        ("config.json", {"vision_config": {"_experts_implementation": "org/kernel"}}, "org/kernel"),
        ("config.json", {"_experts_implementation_internal": "x"}, "_experts_implementation_internal"),
        ("config.json", {"a": [{"auto_map": {"AutoModel": "x.Y"}}]}, "auto_map"),
        ("config.json", {"transformers_weights": "evil.bin"}, "transformers_weights"),
        ("config.json", {"use_kernels": True}, "use_kernels"),
        ("config.json", {"_auto_class": "x"}, "_auto_class"),
        ("config.json", {"quantization_config": {"quant_method": "aqlm"}}, "aqlm"),
        ("adapter_config.json", {"megatron_core": "evil"}, "megatron_core"),
        ("generation_config.json", {"custom_generate": "org/x"}, "custom_generate"),
        ("generation_config.json", {"compile_config": {"backend": "evil"}}, "compile_config"),
        ("generation_config.json", {"cache_implementation": "quantized"}, "cache_implementation"),
        ("generation_config.json", {"assistant_model": "org/x"}, "assistant_model"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["x.Y", None]}}, "auto_map"),
        ("tokenizer_config.json", {"tokenizer_class": "evil.Tokenizer"}, "tokenizer_class"),
        ("tokenizer_config.json", {"tokenizer_class": "Trainer"}, "tokenizer_class"),
        ("tokenizer_config.json", {"vocab_file": "/etc/passwd"}, "vocab_file"),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["../x.json"]}, "fast_tokenizer_files"),
        ("config.json", {"time_step_limit": [0.0, {"__float__": "org/x"}]}, "__float__"),
        ("preprocessor_config.json", {"image_processor_type": "org/x--Processor"}, "image_processor_type"),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "x.Y"}}, "auto_map"),
        ("processor_config.json", {"image_processor": {"auto_map": {"a": "x.Y"}}}, "auto_map"),
        ("sentence_bert_config.json", {"model_args": {"trust_remote_code": True}}, "trust_remote_code"),
    ],
)
def test_model_folder_that_loads_code_is_refused(
    name: str, document: dict[str, Any], told: str, tmp_path: Path
) -> None:
    written(tmp_path, name, document)
    with pytest.raises(CheckpointError, match=told) as refused:
        check_model_folder(tmp_path)
    assert str(tmp_path / name) in str(refused.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"type": "evil.Module"}, "type"),
        ({"type": "sentence_transformers.models.Pooling; x"}, "type"),
        ({"path": "../x"}, "path"),
        ({"import": "x"}, "import"),
    ],
)
def test_modules_json_foreign_class_is_refused(change: dict[str, str], told: str, tmp_path: Path) -> None:
    module = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
    written(tmp_path, "modules.json", [module])
    versions = {"__version__": {"sentence_transformers": "5.1.0", "pytorch": "2.13.0+cpu"}, "prompts": {}}
    written(tmp_path, "config_sentence_transformers.json", versions)
    check_model_folder(tmp_path)
    written(tmp_path, "modules.json", [module | change])
    with pytest.raises(InputError, match=told):
        check_model_folder(tmp_path)


def test_dense_layer_foreign_activation_is_refused(tmp_path: Path) -> None:
    written(tmp_path, "modules.json", [])
    written(tmp_path / "2_Dense", "config.json", {"activation_function": "torch.nn.modules.activation.Tanh"})
    check_model_folder(tmp_path)
    written(tmp_path / "2_Dense", "config.json", {"activation_function": "os.system"})
    with pytest.raises(CheckpointError, match=r"os\.system"):
        check_model_folder(tmp_path)


def test_model_folder_with_adapter_is_refused(tmp_path: Path) -> None:
    written(tmp_path, "adapter_config.json", {"peft_type": "LORA", "megatron_core": "megatron.core"})
    check_model_folder(tmp_path)
    written(tmp_path, "config.json", {"model_type": "llama"})
    with pytest.raises(CheckpointError, match="an adapter lies beside the model"):
        check_model_folder(tmp_path)


def test_model_folder_with_unreferenced_code_is_accepted(tmp_path: Path) -> None:
    """As folders from a hub have it."""
    names = {"_name_or_path": "a/b", "_model_name_or_path": "Smollm2 135M 8k"}
    endless = {"time_step_limit": [0.0, {"__float__": "Infinity"}]}
    written(tmp_path, "config.json", {"model_type": "llama", "auto_map": None} | names | endless)
    settings = {"tokenizer_class": "LlamaTokenizer", "special_tokens_map_file": "/root/x.json", "vocab_file": None}
    written(tmp_path, "tokenizer_config.json", settings | {"added_tokens_decoder": {"0": {"content": "<s>"}}})
    whisper = {"lang_to_id": {"<|en|>": 1}, "alignment_heads": [[1, 2]], "cache_implementation": "static"}
    written(tmp_path, "generation_config.json", whisper | {"_from_model_config": True, "transformers_version": "5"})
    for name in ("modeling_x.py", "pytorch_model.bin", "training_args.bin"):
        written(tmp_path, name, "x")
    check_model_folder(tmp_path)


@pytest.mark.slow
def test_every_transformers_configuration_is_accepted(tmp_path: Path) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    taken = 0
    for name in CONFIG_MAPPING:
        try:
            config = CONFIG_MAPPING[name]().to_json_string(use_diff=False)
        except Exception:  # some need others to be given, or a library
            continue
        hub.check_config(json.loads(config), tmp_path / name)
        taken += 1
    assert taken > 500


# --- graphs ------------------------------------------------------------------------------------------------


def model_of(node: onnx.NodeProto, *functions: onnx.FunctionProto) -> onnx.ModelProto:
    graph = helper.make_graph([node], "g", [], [])
    return helper.make_model(graph, functions=list(functions))


def inside(node: onnx.NodeProto) -> onnx.NodeProto:
    branch = helper.make_graph([node], "b", [], [])
    return helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("EPContext", [], ["y"], domain="com.microsoft"),
        helper.make_node("Snpe", [], ["y"], domain="com.microsoft"),
        helper.make_node("PythonOp", [], ["y"], domain="com.microsoft"),
        helper.make_node("Evil", [], ["y"], domain="evil"),
        helper.make_node("ATen", [], ["y"], domain="org.pytorch.aten"),
        helper.make_node("PyOp", [], ["y"], domain="ai.onnx.contrib"),
        helper.make_node("CustomClipPlugin", [], ["y"], domain="trt.plugins"),
        helper.make_node("EfficientNMS_TRT", [], ["y"]),
    ],
    ids=lambda n: f"{n.domain}.{n.op_type}",
)
def test_custom_library_operator_is_refused(node: onnx.NodeProto, tmp_path: Path) -> None:
    opsets = [helper.make_opsetid("", 17)]
    function = helper.make_function("own", "f", [], ["y"], [node], opsets)
    for model in (
        model_of(node),
        model_of(inside(inside(node))),
        model_of(helper.make_node("f", [], ["y"], domain="own"), function),
    ):
        with pytest.raises(ExportError, match=node.op_type):
            check_listed(tmp_path, model)


def test_standard_and_model_local_operators_are_accepted(tmp_path: Path) -> None:
    for domain, name in (
        ("", "Add"),
        ("com.microsoft", "GroupQueryAttention"),
        ("", "SimplifiedLayerNormalization"),
    ):
        check_listed(tmp_path, model_of(inside(helper.make_node(name, [], ["y"], domain=domain))))
    function = helper.make_function("own", "f", [], ["y"], [], [helper.make_opsetid("", 17)])
    check_listed(tmp_path, model_of(helper.make_node("f", [], ["y"], domain="own"), function))
    model = model_of(helper.make_node("Add", [], ["y"]))
    model.metadata_props.add(key="ort_config", value="{}")
    with pytest.raises(ExportError, match="ort_config"):
        check_listed(tmp_path, model)


# --- Triton and types of files -----------------------------------------------------------------------------

PBTXT = """name: "m"
backend: "onnxruntime"
max_batch_size: 8
default_model_filename: "model.onnx"
input { name: "input_ids" data_type: TYPE_INT64 dims: -1 }
instance_group { count: 1 kind: KIND_CPU }
dynamic_batching { max_queue_delay_microseconds: 1000 }
parameters { key: "arena_extend_strategy" value { string_value: "1" } }
model_warmup { name: "first request" batch_size: 1
  inputs { key: "input_ids" value { data_type: TYPE_INT64 dims: [8] zero_data: true } } }
"""


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('backend: "onnxruntime"', 'backend: "python"', "default_model_filename"),  # a program of that name
        ('backend: "onnxruntime"', 'backend: "onnxruntime" backend: "python"', "backend"),
        ('backend: "onnxruntime"', 'backend: "onnxruntime" backend: "onnxruntime"', "backend 2 times"),
        ('backend: "onnxruntime"', "", "backend 0 times"),
        ('name: "m"', 'name: "m" model_transaction_policy { decoupled: true }', "model_transaction_policy"),
        ('backend: "onnxruntime"', 'backend: "vllm"', "backend"),
        ('backend: "onnxruntime"', 'platform: "tensorrt_plan"', "platform"),
        ('backend: "onnxruntime"', 'runtime: "libtriton_evil.so"', "runtime"),
        ('"arena_extend_strategy"', '"EXECUTION_ENV_PATH"', "EXECUTION_ENV_PATH"),
        ('string_value: "1"', 'string_value: "/x"', "string_value"),
        ('name: "m"', 'name: "m" model_operations { op_library_filename: "evil.so" }', "model_operations"),
        ('"model.onnx"', '"../model.onnx"', "default_model_filename"),
        ("zero_data: true", 'input_data_file: "/etc/passwd"', "input_data_file"),
        ("max_batch_size: 8", "max_batch_size: 8 }", "text format"),
        ("max_batch_size: 8", "[a.b]: 8", "text format"),
        ("max_batch_size: 8", "a {" * 40, "text format"),
    ],
)
def test_triton_config_unlisted_field_is_refused(old: str, new: str, told: str, tmp_path: Path) -> None:
    check_triton(written(tmp_path, "config.pbtxt", PBTXT))
    with pytest.raises(InputError, match=told):
        check_triton(written(tmp_path, "config.pbtxt", PBTXT.replace(old, new)))


PYTHON = """name: "m"
backend: "python"
model_transaction_policy { decoupled: true }
input { name: "text_input" data_type: TYPE_STRING dims: 1 optional: true }
parameters { key: "graph" value { string_value: "other.model" } }
parameters { key: "end_tokens" value { string_value: "2 151645" } }
"""


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('backend: "python"', 'backend: "python" default_model_filename: "model.onnx"', "default_model_filename"),
        ('backend: "python"', 'backend: "python" runtime: "x.so"', "runtime"),
        ('"graph"', '"EXECUTION_ENV_PATH"', "EXECUTION_ENV_PATH"),
        ('"graph"', '"FORCE_CPU_ONLY_INPUT_TENSORS"', "FORCE_CPU_ONLY_INPUT_TENSORS"),
        ('"other.model"', '"../other"', "string_value"),
        ('"other.model"', '".."', "string_value"),
        ('"2 151645"', '"2/151645"', "string_value"),
        ("optional: true", 'optional: "yes"', "optional"),
    ],
)
def test_triton_python_config_unlisted_field_is_refused(old: str, new: str, told: str, tmp_path: Path) -> None:
    assert check_triton(written(tmp_path, "config.pbtxt", PYTHON)) == ("m", "python")
    with pytest.raises(InputError, match=told):
        check_triton(written(tmp_path, "config.pbtxt", PYTHON.replace(old, new)))


@pytest.mark.parametrize(
    "name",
    [
        "evil.so", "evil.so.1.2", "evil.DLL", "evil.dylib", "model.py", "model.pkl", "pytorch_model.bin",
        "model.pt", "other.json", "LICENSE.so", "NOTICE.py", "1/model.py", "run.sh", "tokenizer_module.json",
        "x.zip",
    ],
)  # fmt: skip
def test_package_file_of_unknown_type_is_refused(name: str, tmp_path: Path) -> None:
    for known in ("README.md", "LICENSE", "NOTICE.txt", "model.onnx", "model.onnx.data", "model.onnx_data_3"):
        written(tmp_path, known, "x")
    files.refuse_strangers(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    written(tmp_path / Path(name).parent, Path(name).name, "x")
    with pytest.raises(InputError, match="not a type of file that a package contains"):
        files.refuse_strangers(tmp_path)


@pytest.mark.parametrize("start", [b"\x7fELF", b"MZ\0\0", b"\xcf\xfa\xed\xfe"])
def test_package_renamed_shared_library_is_refused(start: bytes, tmp_path: Path) -> None:
    (tmp_path / "NOTICE").write_bytes(start)
    with pytest.raises(InputError, match="shared library"):
        files.refuse_libraries(tmp_path)
    with pytest.raises(InputError, match="not a type of file"):
        files.refuse_strangers(tmp_path)
    (tmp_path / "NOTICE").rename(tmp_path / "model.onnx.data")
    files.refuse_libraries(tmp_path)
