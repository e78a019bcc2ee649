"""Embedders and cross-encoders in sentence-transformers' ONNX backend and fastembed: to 1e-5 as in PyTorch."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from tests.consumers import environments as consumers
from tests.end_to_end.conftest import Run, prepared
from tests.onnx_export.conftest import save_tokenizer
from tests.onnx_export.sentences import save_modules

pytestmark = pytest.mark.slow
TEXTS = ["A short one.", "The capital of France is Paris, and has been for a very long time, they say.", "x"]
CLOSE = 1e-5


def _adapter(model: Any, folder: Path, targets: list[str], **settings: Any) -> None:
    torch.manual_seed(5)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **settings))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    tuned.save_pretrained(folder)


def _delivered(run: Run, root: Path) -> Path:
    words = ["-b", root / "base", "-a", root / "adapter", "-o", root / "run", "--max-time", "1s"]
    code, _, talk = run("merge-and-export", *words)
    assert code == 0, talk
    for target in ("hf", "optimum"):
        code, _, talk = run("package", root / "run", "--for", target, "-o", root / target)
        assert code == 0, talk
    code, found, talk = run("verify", root / "run", "-b", root / "base", "-a", root / "adapter")
    assert code == 0 and found["verified"], talk
    return root


@pytest.fixture(scope="module")
def minilm(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """all-MiniLM-L6-v2 with a dense layer of its own and a LoRA."""
    root = tmp_path_factory.mktemp("embedder")
    shutil.copytree(prepared("prepare_smollm2.py", "--minilm"), root / "base")
    for old in ("modules.json", "1_Pooling", "2_Normalize", "config_sentence_transformers.json"):
        path = root / "base" / old
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    save_modules(root / "base", 384, ("mean_tokens", "max_tokens"), ((128, "Tanh"),))
    model = transformers.AutoModel.from_pretrained(root / "base")
    _adapter(model, root / "adapter", ["query", "value"], task_type="FEATURE_EXTRACTION")
    return _delivered(run, root)


_EMBED = """
import json, sys
from sentence_transformers import SentenceTransformer
texts = {texts!r}
made = [SentenceTransformer(folder, device="cpu", backend=backend)
        for folder, backend in (({hf!r}, "torch"), ({onnx!r}, "onnx"), ({base!r}, "torch"))]
print(json.dumps([type(made[1][0].auto_model).__name__, made[1].prompts.get("query"),
                  *(m.encode(texts).tolist() for m in made)]))
"""


def _embedded(root: Path, base: str = "base") -> tuple[Any, ...]:
    """The class behind the ONNX backend, a prompt, and the embeddings of PyTorch, of ONNX, of the base."""
    code = _EMBED.format(texts=TEXTS, hf=str(root / "hf"), onnx=str(root / "optimum"), base=str(root / base))
    name, prompt, *vectors = consumers.python(consumers.sentence_python(), code)
    return (name, prompt, *map(np.array, vectors))


def test_sentence_transformers_loads_onnx_as_it_is(minilm: Path) -> None:
    name, prompt, wanted, found, base = _embedded(minilm)
    assert (name, prompt) == ("ORTModelForFeatureExtraction", "query: ")
    assert wanted.shape == (3, 128)
    assert np.abs(found - wanted).max() < CLOSE < 100 * CLOSE < np.abs(wanted - base).max()


_GRAPH = """
import json, onnxruntime
from transformers import AutoTokenizer
session = onnxruntime.InferenceSession({folder!r} + "/model.onnx")
inputs = AutoTokenizer.from_pretrained({folder!r})({texts!r}, padding=True, return_tensors="np")
print(json.dumps(session.run(["sentence_embedding"], dict(inputs))[0].tolist()))
"""


def test_graph_needs_no_sentence_transformers(minilm: Path) -> None:
    """Whatever pools by itself, as text-embeddings-inference does not with a dense layer, can take the output."""
    _, _, wanted, *_ = _embedded(minilm)
    code = _GRAPH.format(folder=str(minilm / "optimum"), texts=TEXTS)
    found = np.array(consumers.python(consumers.sentence_python(), code))
    assert np.abs(found - wanted).max() < CLOSE


_FAST = """
import json
from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType
TextEmbedding.add_custom_model(
    model="own/model", pooling=PoolingType.MEAN, normalization=False, sources=ModelSource(hf="own/model"), dim=384,
    model_file="model.onnx", additional_files=["model.onnx_data"],
)
model = TextEmbedding("own/model", specific_model_path={folder!r})
print(json.dumps([row.tolist() for row in model.embed({texts!r})]))
"""


def test_fastembed_pools_states_of_package(minilm: Path) -> None:
    reader = transformers.AutoTokenizer.from_pretrained(minilm / "run" / "merged")
    model = transformers.AutoModel.from_pretrained(minilm / "run" / "merged").eval()
    with torch.no_grad():
        wanted = [model(**reader(t, return_tensors="pt")).last_hidden_state[0].mean(0).numpy() for t in TEXTS]
    code = _FAST.format(folder=str(minilm / "optimum"), texts=TEXTS)
    found = np.array(consumers.python(consumers.sentence_python(), code))
    assert np.abs(found - np.array(wanted)).max() / np.abs(wanted).max() < CLOSE


# --- decoders ----------------------------------------------------------------------------------------------


def test_decoder_with_modules_is_embedder_in_onnx(run: Run, tmp_path: Path) -> None:
    """As Qwen3-Embedding is stored: as a language model, pooled at the last token, padded on the left."""
    torch.manual_seed(4)
    config = transformers.Qwen3Config(
        vocab_size=100, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, initializer_range=0.2, eos_token_id=2,
        pad_token_id=3, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    settings = tmp_path / "base" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"padding_side": "left"}))
    save_modules(tmp_path / "base", 64, ("lasttoken",))
    body = transformers.AutoModel.from_pretrained(tmp_path / "base")
    _adapter(body, tmp_path / "adapter", ["q_proj", "v_proj"], task_type="FEATURE_EXTRACTION")
    _delivered(run, tmp_path)
    record = json.loads((tmp_path / "run" / "onnx" / "export.json").read_text())
    assert (record["task"], record["engine"]) == ("feature-extraction", "dynamo")
    name, _, wanted, found, _ = _embedded(tmp_path, "hf")
    assert name == "ORTModelForFeatureExtraction"
    assert np.abs(found - wanted).max() < CLOSE


# --- cross-encoders ----------------------------------------------------------------------------------------

_RANK = """
import json
from sentence_transformers import CrossEncoder
pairs = [("what is it", t) for t in {texts!r}]
made = [CrossEncoder(folder, device="cpu", backend=backend)
        for folder, backend in (({hf!r}, "torch"), ({onnx!r}, "onnx"))]
print(json.dumps([str(made[1].activation_fn), *(m.predict(pairs).tolist() for m in made)]))
"""


def test_cross_encoder_loads_onnx_as_it_is(run: Run, tmp_path: Path) -> None:
    torch.manual_seed(4)
    config = transformers.BertConfig(
        vocab_size=30522, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.2, num_labels=1,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    minilm = prepared("prepare_smollm2.py", "--minilm")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copyfile(minilm / name, tmp_path / "base" / name)
    stored = tmp_path / "base" / "config.json"
    own = {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "5.7.0"}}
    stored.write_text(json.dumps(json.loads(stored.read_text()) | own))
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    _adapter(model, tmp_path / "adapter", ["query", "value"], task_type="SEQ_CLS")
    root = _delivered(run, tmp_path)
    code = _RANK.format(texts=TEXTS, hf=str(root / "hf"), onnx=str(root / "optimum"))
    activation, wanted, found = consumers.python(consumers.sentence_python(), code)
    assert activation == "Identity()"
    assert np.abs(np.array(found) - np.array(wanted)).max() < CLOSE
