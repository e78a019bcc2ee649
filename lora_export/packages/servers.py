"""How vLLM and TGI serve a folder of weights: the commands, and a request to each.

vLLM's `--dtype auto` computes in the type that config.json names, but in 16 bits where that is fp32: bf16, or fp16
for an embedder. It refuses fp16 for a few architectures and computes those in bf16. TGI computes most models in
fp16 unless it is told to use bf16, and knows no other type (its launcher's `--dtype`).
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from lora_export.packages.job import PackageFacts
from lora_export.packages.programs import TOKENS, prompt_of

_HALF = ("float16", "bfloat16")
_NOT_IN_FP16 = ("gemma2", "gemma3", "gemma3_text", "glm4")  # vllm/config/model.py, _FLOAT16_NOT_SUPPORTED_MODELS
_POOLED = {"feature-extraction": "/v1/embeddings", "text-classification": "/classify"}  # task → path of a request


def notes(facts: PackageFacts) -> str:
    """Markdown for a package of a text model that a server can serve; '' for others."""
    if facts.task.input != "text":
        return ""
    if facts.task.name == "text-generation":
        return _generating(facts)
    return _pooling(facts) if facts.task.name in _POOLED else ""


def vllm_words(facts: PackageFacts) -> list[str]:
    """The words of `vllm serve` in the package's folder, so that it computes in the type of the weights."""
    pooling = ["--runner", "pooling"] if facts.task.name in _POOLED else []
    halves = facts.precision in _HALF and not _refuses_fp16(facts)
    dtype = [] if halves else ["--dtype", "float32"]
    return ["vllm", "serve", ".", *pooling, *dtype, "--served-model-name", facts.name]


def tgi_words(facts: PackageFacts) -> list[str]:
    dtype = facts.precision if facts.precision in _HALF else "bfloat16"
    return ["text-generation-launcher", "--model-id", ".", "--dtype", dtype, "--port", "8080"]


def _refuses_fp16(facts: PackageFacts) -> bool:
    return facts.precision == "float16" and facts.config.get("model_type") in _NOT_IN_FP16


def _generating(facts: PackageFacts) -> str:
    asked = {"prompt": prompt_of(facts), "max_tokens": TOKENS, "temperature": 0}
    parameters = {"max_new_tokens": TOKENS, "do_sample": False}
    return "\n\n".join(
        [
            f"vLLM loads the same folder{_why(facts)}:",
            _block(vllm_words(facts)),
            "Then, in another terminal:",
            _request("8000/v1/completions", {"model": facts.name, **asked}),
            f"TGI loads it too{_rounds(facts)}:",
            _block(tgi_words(facts)),
            _request("8080/generate", {"inputs": prompt_of(facts), "parameters": parameters}),
        ]
    )


def _pooling(facts: PackageFacts) -> str:
    return "\n\n".join(
        [
            f"vLLM loads the same folder, if it knows the architecture{_why(facts)}:",
            _block(vllm_words(facts)),
            "Then, in another terminal:",
            _request(f"8000{_POOLED[facts.task.name]}", {"model": facts.name, "input": prompt_of(facts)}),
        ]
    )


def _why(facts: PackageFacts) -> str:
    if "--dtype" not in vllm_words(facts):
        return ""
    if facts.precision in _HALF:
        return ", in fp32, as it refuses fp16 for this architecture"
    return ". Without the flag it computes in 16 bits, and the answers can differ"


def _rounds(facts: PackageFacts) -> str:
    return "" if facts.precision in _HALF else ", but rounds the weights: it has no fp32"


def _block(words: Sequence[str]) -> str:
    return f"```bash\n{shlex.join(words)}\n```"


def _request(where: str, body: Mapping[str, Any]) -> str:
    """curl with JSON of one line, so that no text of a model can end it."""
    lines = [
        f"curl http://localhost:{where} -H 'Content-Type: application/json' --data @- <<'END'",
        json.dumps(body),
        "END",
    ]
    return "\n".join(["```bash", *lines, "```"])
