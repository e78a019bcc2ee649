"""What runtimes read: genai_config.json, config.pbtxt and the documents of a model's folder."""

import contextlib
import json
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from lora_export.allowed import check_model_folder, check_onnx_folder, hub
from lora_export.allowed.fields import LIMIT
from lora_export.errors import LoraExportError
from tests.allowed.test_lists import GENAI, PBTXT
from tests.fuzz.guard import attempt, harness
from tests.fuzz.strategies import damaged_bytes, encoded, json_files

# Keys that genai reads and that name code, files or addresses; and some that it takes.
DANGEROUS = (
    "custom_ops_library", "enable_profiling", "tokenizer_dir", "adapter_filename", "config_filename", "data_file",
    "run_options", "device_filtering_options", "gpu_external_alloc", "user_compute_stream", "backend_path", "QNN",
    "OpenVINO", "ep.context_file_path", "session.model_external_initializers_file_folder_path", "pipeline", "vad",
)  # fmt: skip
KEYS = (
    *DANGEROUS,
    "filename",
    "session_options",
    "provider_options",
    "cuda",
    "decoder",
    "encoder",
    "sliding_window",
)


@st.composite
def configs(draw: st.DrawFn) -> bytes:
    """A damaged genai_config.json, now and then with a part of it twice under one key."""
    content = draw(json_files(GENAI, KEYS))
    if draw(st.integers(0, 5)) == 0:
        evil = {"decoder": {"session_options": {draw(st.sampled_from(DANGEROUS)): "evil.so"}}}
        content = b'{"model": ' + encoded(evil) + b", " + content.lstrip()[1:]
    return content


def _pairs(document: Any) -> Iterator[tuple[str, Any]]:
    waiting = [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


@harness(120, content=configs(), name=st.sampled_from(["genai_config.json", "genai_config.cuda.json"]))
def test_genai_config(content: bytes, name: str) -> None:
    """What is taken names no code, no file but graphs beside it, and says each thing once."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(content)
        if isinstance(attempt(Path(folder), lambda: check_onnx_folder(Path(folder))), LoraExportError):
            return
    seen: list[list[str]] = []
    document = json.loads(
        content, object_pairs_hook=lambda pairs: (seen.append([k for k, _ in pairs]), dict(pairs))[1]
    )
    assert all(len(keys) == len(set(keys)) for keys in seen)
    for key, value in _pairs(document):
        assert key not in DANGEROUS
        assert key != "filename" or (value.endswith(".onnx") and "/" not in value and "\\" not in value)


@harness(60, content=damaged_bytes(PBTXT.encode()) | st.binary(max_size=60))
def test_triton_config(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.pbtxt").write_bytes(content)
        taken = attempt(Path(folder), lambda: check_onnx_folder(Path(folder)))
    if not isinstance(taken, LoraExportError):
        assert not any(word in content for word in (b"platform", b"runtime:", b"library", b"EXECUTION_ENV_PATH"))
        assert b'"python"' not in content or b"default_model_filename" not in content


MODEL = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "attn_implementation": "sdpa", "auto_map": None,
    "text_config": {"_attn_implementation": {"": "eager"}}, "tokenizer_class": "LlamaTokenizer", "vocab_file": None,
    "cache_implementation": "static", "temperature": 0.5, "stop_strings": ["a"],
}  # fmt: skip


@harness(80, name=st.sampled_from(sorted(hub.CHECKS)), content=json_files(MODEL, (*hub.REFUSED, *MODEL)))
def test_model_documents(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(content)
        taken = attempt(Path(folder), lambda: check_model_folder(Path(folder)))
    if not isinstance(taken, LoraExportError):
        for key, value in _pairs(json.loads(content)):
            assert key not in hub.REFUSED or not value
            assert not key.endswith("attn_implementation") or "/" not in json.dumps(value)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 2**19 + "]" * 2**19,
        '{"a":' * 2**17,
        json.dumps({"model": {"eos_token_id": list(range(2**17))}}),
        json.dumps({"model": {"eos_token_id": [[]] * (2**18 - 20)}}),
        json.dumps({"model": {f"k{i}": i for i in range(60_000)}}),
        json.dumps({"search": {"x" * 2**19: 1, "temperature": 0.5}}),
        json.dumps({"model": {"type": "x" * (2**20 - 100)}}),
        "{" + ",".join(f'"{i}":{{}}' for i in range(2**16)) + "}",
        "9" * 2**20,
    ],
    ids=["deep", "open", "numbers", "lists", "keys", "long key", "long text", "objects", "digits"],
)
def test_genai_config_of_a_megabyte_is_read_in_a_second_and_little_memory(text: str, tmp_path: Path) -> None:
    assert len(text) <= LIMIT
    (tmp_path / "genai_config.json").write_text(text)
    tracemalloc.start()
    started = time.process_time()
    with contextlib.suppress(LoraExportError):
        check_onnx_folder(tmp_path)
    seconds, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 10 * len(text) + 100 * 2**20
    assert seconds < 5  # with tracemalloc, which makes it several times slower; a second without
