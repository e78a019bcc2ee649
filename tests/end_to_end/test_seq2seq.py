"""Encoder-decoders from adapter to package: unequal depths, pictures in, and only SentencePiece files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from tests.consumers import environments as consumers
from tests.consumers.test_readmes import program
from tests.end_to_end.conftest import Run
from tests.onnx_export.conftest import VOCABULARY, save_tokenizer
from tests.onnx_export.test_fast_tokenizer import _marian as save_marian_tokenizer

pytestmark = pytest.mark.slow
TEXT = "The ship sails at noon."
_SIZES = {
    "d_model": 64, "encoder_ffn_dim": 112, "decoder_ffn_dim": 112, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip


def _t5(folder: Path) -> tuple[Any, list[str]]:
    save_tokenizer(folder)
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=64, num_layers=2, num_decoder_layers=3, num_heads=4, d_kv=16, d_ff=112,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config), ["q", "v", "wo"]


def _trocr(folder: Path) -> tuple[Any, list[str]]:
    save_tokenizer(folder)
    size = {"height": 32, "width": 32}
    processor = {"image_processor_type": "ViTImageProcessor", "size": size, "do_resize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    encoder = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=112,
        image_size=32,
        patch_size=8,
    )
    decoder = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80,
        max_position_embeddings=64, is_decoder=True, add_cross_attention=True,
    )  # fmt: skip
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        encoder, decoder, decoder_start_token_id=1, pad_token_id=3, eos_token_id=2
    )
    return transformers.VisionEncoderDecoderModel(config=config), ["query", "value"]


def _marian(folder: Path) -> tuple[Any, list[str]]:
    folder.rmdir()
    save_marian_tokenizer(folder)
    words = json.loads((folder / "vocab.json").read_text())
    config = transformers.MarianConfig(
        vocab_size=len(words), encoder_layers=3, decoder_layers=1, pad_token_id=words["<pad>"], eos_token_id=0,
        decoder_start_token_id=words["<pad>"], forced_eos_token_id=None, **_SIZES,
    )  # fmt: skip
    return transformers.MarianMTModel(config), ["q_proj", "v_proj"]


def _made(make: Callable[[Path], tuple[Any, list[str]]], root: Path, run: Run) -> Any:
    """A run in `root`, of an adapter and a base with random weights; returns PEFT's unmerged model."""
    torch.manual_seed(0)
    (root / "base").mkdir()
    model, targets = make(root / "base")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.15)
    model.save_pretrained(root / "base")
    model = type(model).from_pretrained(root / "base")
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets))
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.15)
    tuned.save_pretrained(root / "adapter")
    words = ["-b", root / "base", "-a", root / "adapter", "-o", root / "run", "--max-time", "5s"]
    code, _, talk = run("merge-and-export", *words)
    assert code == 0, talk
    return tuned.get_base_model().eval()


@pytest.mark.parametrize("make", [_t5, _trocr])
def test_seq2seq_run_passes_its_gates_and_is_packaged(make: Any, run: Run, tmp_path: Path) -> None:
    _made(make, tmp_path, run)
    names = {"encoder_model.onnx", "decoder_model_merged.onnx"}
    for target, folder in (("optimum", "."), ("transformers-js", "onnx")):
        words = ["--for", target, *(["--variant", "fp32"] if target == "transformers-js" else [])]
        code, _, talk = run("package", tmp_path / "run", *words, "-o", tmp_path / target)
        assert code == 0, talk
        assert names <= {p.name for p in (tmp_path / target / folder).iterdir()}


def test_marian_of_sentencepiece_files_says_the_same_in_optimum_and_transformers_js(
    run: Run, tmp_path: Path
) -> None:
    unmerged = _made(_marian, tmp_path, run)
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    for target in ("optimum", "transformers-js"):
        words = ["--for", target, *(["--variant", "fp32"] if target == "transformers-js" else [])]
        code, _, talk = run("package", tmp_path / "run", *words, "-o", tmp_path / target)
        assert code == 0, talk
    ids = reader(TEXT, return_tensors="pt")["input_ids"]
    plain = {"max_new_tokens": 12, "num_beams": 1, "do_sample": False}
    wanted = unmerged.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **plain)[0].tolist()
    code = f"""
import json, torch
from optimum.onnxruntime import ORTModelForSeq2SeqLM
model = ORTModelForSeq2SeqLM.from_pretrained({str(tmp_path / "optimum")!r})
ids = torch.tensor({ids.tolist()})
print(json.dumps(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **{plain})[0].tolist()))
"""
    assert consumers.python(consumers.optimum_python(), code) == wanted
    asked = program(tmp_path / "transformers-js")
    (read,) = (line for line in asked.splitlines() if "await reader(" in line)
    answer = "JSON.stringify([Array.from(inputs.input_ids.data, Number), tokens.tolist()[0].map(Number)])"
    asked = asked.replace(read, f"const inputs = await reader({json.dumps(TEXT)});")
    asked = asked.replace("JSON.stringify(said)", answer).replace("max_new_tokens: 32", "max_new_tokens: 12")
    assert consumers.node(asked) == [ids[0].tolist(), wanted]
