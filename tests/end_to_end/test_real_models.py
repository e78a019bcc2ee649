"""Real weights of other families, by the command line: a LoRA merged, validated, exported, its graph validated."""

import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers

from tests.end_to_end.conftest import Run, prepared

pytestmark = pytest.mark.slow
CLASSES = {
    "whisper-tiny.en": (transformers.WhisperForConditionalGeneration, ["q_proj", "v_proj"]),
    "rxnfp": (transformers.BertForMaskedLM, ["query", "value"]),
}
REACTIONS = "CCO.CC(=O)O>>CC(=O)OCC\nc1ccccc1Br.OB(O)c1ccccc1>>c1ccc(-c2ccccc2)cc1\nCC(C)=O>>CC(C)O\n"


@pytest.mark.parametrize("name", CLASSES)
def test_real_model_lora_passes(name: str, run: Run, tmp_path: Path) -> None:
    base, (cls, targets) = prepared("prepare_others.py", name), CLASSES[name]
    torch.manual_seed(5)
    config = peft.LoraConfig(r=8, lora_alpha=12, target_modules=targets)
    model = peft.get_peft_model(cls.from_pretrained(base), config)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "prompts.txt").write_text(REACTIONS)
    words = ["--prompts", tmp_path / "prompts.txt"] if name == "rxnfp" else []
    out = tmp_path / "out"
    code, document, talk = run(
        "merge-and-export", "-b", base, "-a", tmp_path / "adapter", "-o", out, "--max-seconds", "5", *words
    )
    assert code == 0, talk
    assert document["validate"]["passed"]
    checks = {c["name"]: c for c in document["validate"]["checks"]}
    assert any(name.startswith("onnx_") for name in checks)
    assert checks["tensor_errors"]["value"] == 0
    assert document["benchmark"]["graph_identical"]


def test_real_body_with_new_head_passes(run: Run, minilm: Path, tmp_path: Path) -> None:
    """all-MiniLM, a bare BERT, trained to tell good from bad: merged, it is a classifier that does."""
    bert = shutil.copytree(minilm, tmp_path / "bert", ignore=shutil.ignore_patterns("*sentence*", "modules.json"))
    cls, tokenizer = transformers.BertForSequenceClassification, transformers.AutoTokenizer.from_pretrained(bert)
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=20, target_modules=["query", "value"])
    model = peft.get_peft_model(cls.from_pretrained(bert, num_labels=2, dtype=torch.float32), config)
    good = ["I love this film", "what a great day", "wonderful food and kind people", "happy and delighted"]
    bad = ["I hate this film", "what an awful day", "terrible food and rude people", "sad and disappointed"]
    inputs, labels = tokenizer(good + bad, return_tensors="pt", padding=True), torch.tensor([1] * 4 + [0] * 4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(30):
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path / "adapter")
    out = tmp_path / "out"
    words = "merge-and-export", "-b", bert, "-a", tmp_path / "adapter", "-o", out, "--max-time", "5s"
    code, document, talk = run(*words)
    assert code == 0, talk
    assert document["validate"]["passed"] and document["benchmark"]["graph_identical"]
    merged = cls.from_pretrained(out / "merged", dtype=torch.float32).eval()
    asked = tokenizer(["a lovely evening", "a horrible smell"], return_tensors="pt", padding=True)
    with torch.no_grad():
        found, expected = merged(**asked).logits, model(**asked).logits
    assert found.argmax(-1).tolist() == [1, 0]
    assert float((found - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_real_encoder_with_int8_inputs_keeps_its_adapter(kind: str, run: Run, minilm: Path, tmp_path: Path) -> None:
    """The effect of a LoRA on the vectors of all-MiniLM, measured on texts that nothing was calibrated on."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=12, target_modules=["query", "value", "dense"])
    tuned = peft.get_peft_model(transformers.AutoModel.from_pretrained(minilm), config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    tuned.save_pretrained(tmp_path / "adapter")
    inputs = ["-b", minilm, "-a", tmp_path / "adapter", "-o", tmp_path / "out", "--max-time", "5s"]
    code, document, talk = run("merge-and-export", *inputs, "--precision", "int8", "--activations", kind)
    assert code == 0, talk
    checks = {c["name"]: c for c in document["validate"]["checks"]}
    assert 0.95 < checks["onnx_adapter_survival"]["value"] < 1.05
    assert (document["export"]["calibration"] is not None) == (kind == "static")


def test_whisper_silence_gives_no_text() -> None:
    """The conversion: a model whose weights lie in the wrong places babbles."""
    folder = prepared("prepare_others.py", "whisper-tiny.en")
    model = transformers.WhisperForConditionalGeneration.from_pretrained(folder)
    tokens = model.generate(torch.full((1, 80, 3000), -1.0), max_new_tokens=20, do_sample=False)
    assert tokens.tolist() == [[50361]]  # <|nocaptions|>
