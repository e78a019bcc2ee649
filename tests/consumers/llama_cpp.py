"""llama.cpp in tests: xllamacpp is asked in an environment of its own, one process a model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.consumers.environments import installed, python, version

NAME = "llama.cpp (xllamacpp)"
_PACKAGES = ("xllamacpp==2026.10.11549",)
_ASK = """
import json, xllamacpp
job = json.loads({job!r})
params = xllamacpp.CommonParams()
params.model.path = job["model"]
params.n_ctx = params.n_batch = params.n_ubatch = 512
params.n_parallel, params.warmup, params.verbosity = 1, False, -1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # its threads spin where they wait
if job["exact"]:
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
if job["lora"]:
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(job["lora"], 1.0)]
params.embedding = job["call"] == "handle_embeddings"
call = getattr(xllamacpp.Server(params), job["call"])
print(json.dumps([call(request) for request in job["requests"]]))
"""


def interpreter() -> Path:
    """Of an environment with xllamacpp, a prebuilt llama.cpp."""
    return installed("xllama", _PACKAGES)


def told_version() -> str:
    return version(interpreter(), "xllamacpp")


def ask(
    model: Path, call: str, requests: Sequence[dict[str, Any]], lora: Path | None = None, exact: bool = True
) -> list[dict[str, Any]]:
    """The server's answers. exact: keys, values and attention in fp32; otherwise llama.cpp's defaults."""
    job = {
        "model": str(model), "call": call, "requests": list(requests), "lora": str(lora) if lora else None,
        "exact": exact,
    }  # fmt: skip
    answers: list[dict[str, Any]] = python(interpreter(), _ASK.format(job=json.dumps(job)))
    return answers


def continued(
    model: Path, prompts: Sequence[str | Sequence[int]], count: int, lora: Path | None = None,
    banned: Sequence[int] = (),
) -> list[tuple[int, ...]]:  # fmt: skip
    """Greedy tokens after each prompt, a text or tokens, none of them banned; an end of text is not among them."""
    settings = {"max_tokens": count, "temperature": 0, "logprobs": 1, "logit_bias": [[t, -1e9] for t in banned]}
    requests = [{"prompt": p, **settings} for p in prompts]
    answers = ask(model, "handle_completions", requests, lora)
    return [tuple(t["id"] for t in a["choices"][0]["logprobs"]["content"]) for a in answers]


def log_likelihoods(model: Path, tokens: Sequence[int]) -> list[float]:
    """log p of each token but the first, given those before it, with llama.cpp's defaults.

    A token is made certain by a bias, and the server tells its probability before that.
    """
    requests = [
        {"prompt": list(tokens[:i]), "max_tokens": 1, "temperature": 0, "logprobs": 1,
         "logit_bias": [[tokens[i], 10_000.0]], "cache_prompt": True}
        for i in range(1, len(tokens))
    ]  # fmt: skip
    answers = ask(model, "handle_completions", requests, exact=False)
    told = [a["choices"][0]["logprobs"]["content"][0] for a in answers]
    assert [t["id"] for t in told] == list(tokens[1:])
    return [t["logprob"] for t in told]
