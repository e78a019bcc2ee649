"""What a model card says of vLLM and TGI, read by the shell that a person would give it to."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lora_export.packages import servers
from lora_export.packages.job import PackageFacts, Sample
from lora_export.packages.targets import targets
from lora_export.packages.tasks import task_of

PROMPT = "a\"b'c\\\nEND\n$(touch owned)`touch owned`\u2028 😀"


def facts_of(
    precision: str = "float32", task: str = "text-generation", name: str = "chat", **config: Any
) -> PackageFacts:
    found = task_of(task, "LlamaForCausalLM")
    return PackageFacts(targets()["hf"], name, found, precision, (), ("cpu",), Sample(PROMPT, "t"), config)


@pytest.mark.parametrize(
    ("precision", "kind", "vllm", "tgi"),
    [
        ("float32", "llama", ["--dtype", "float32"], "bfloat16"),
        ("bfloat16", "llama", [], "bfloat16"),
        ("float16", "llama", [], "float16"),
        ("float16", "gemma3_text", ["--dtype", "float32"], "float16"),
        ("bfloat16", "gemma3_text", [], "bfloat16"),
    ],
)
def test_servers_compute_in_type_of_weights(precision: str, kind: str, vllm: list[str], tgi: str) -> None:
    facts = facts_of(precision, model_type=kind)
    assert servers.vllm_words(facts) == ["vllm", "serve", ".", *vllm, "--served-model-name", "chat"]
    words = servers.tgi_words(facts)
    assert words[words.index("--dtype") + 1] == tgi
    text = servers.notes(facts)
    assert ("rounds the weights" in text) is (precision == "float32")
    assert ("16 bits" in text) is (precision == "float32") and ("refuses fp16" in text) is (
        precision != "float32" and bool(vllm)
    )


@pytest.mark.parametrize(
    ("task", "path"),
    [("feature-extraction", "/v1/embeddings"), ("text-classification", "/classify")],
)
def test_servers_pool_encoders(task: str, path: str) -> None:
    facts = facts_of(task=task)
    assert servers.vllm_words(facts)[:5] == ["vllm", "serve", ".", "--runner", "pooling"]
    text = servers.notes(facts)
    assert f"localhost:8000{path} " in text and "text-generation-launcher" not in text


@pytest.mark.parametrize(
    "task", ["fill-mask", "image-classification", "text2text-generation", "question-answering"]
)
def test_servers_of_other_tasks_are_not_promised(task: str) -> None:
    assert servers.notes(facts_of(task=task)) == ""


def test_servers_commands_hold_names_as_data(tmp_path: Path) -> None:
    """The shell runs each block with programs that write down what they are given."""
    name = 'x"; touch owned; $(touch owned) `touch owned`'
    for program in ("vllm", "text-generation-launcher", "curl"):
        stub = tmp_path / "bin" / program
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(f'#!/bin/sh\nfor w in "$@"; do printf "%s\\n" "$w"; done >> {tmp_path}/{program}.words\n')
        with stub.open("a") as file:
            file.write(f"cat >> {tmp_path}/{program}.data\n" if program == "curl" else "")
        stub.chmod(0o755)
    blocks = re.findall(r"^```bash\n(.*?)\n```$", servers.notes(facts_of(name=name)), re.S | re.M)
    assert len(blocks) == 4
    for block in blocks:
        subprocess.run(
            ["bash", "-euc", block], cwd=tmp_path, check=True, env={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
        )
    assert not (tmp_path / "owned").exists()
    assert (tmp_path / "vllm.words").read_text().splitlines()[-1] == name
    completion, generated = map(json.loads, (tmp_path / "curl.data").read_text().splitlines())
    assert completion["model"] == name and completion["prompt"] == generated["inputs"] == PROMPT
    assert completion["max_tokens"] == generated["parameters"]["max_new_tokens"]
