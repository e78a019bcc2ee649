"""Programs that have llama.cpp answer the sample of a package, by xllamacpp, which needs no compiler."""

from lora_export.packages.gguf import model_file
from lora_export.packages.interpreters import Python
from lora_export.packages.job import PackageFacts, Snippet
from lora_export.packages.programs import NUMBERS, TOKENS, prompt_of

_CONTEXT = 1024  # tokens, of which a sample and its answer need fewer than 100
_LOAD = """import json
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path = {path!r}
params.n_ctx = params.n_batch = params.n_ubatch = {context}
params.n_parallel, params.warmup, params.verbosity = 1, False, -1
# Keys, values and attention in fp32, as the merged model was validated; llama.cpp's default for them is fp16.
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
"""
_TEXT = """model = xllamacpp.Server(params)
request = {{"prompt": {prompt!r}, "max_tokens": {tokens}, "temperature": 0}}
print(json.dumps(model.handle_completions(request)["choices"][0]["text"]))"""
# The state of the first token, before a pooling: what the graph of the run has first.
_STATES = """params.embedding, params.pooling_type = True, xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_CLS
model = xllamacpp.Server(params)
request = {{"input": {prompt!r}, "embd_normalize": -1}}
print(json.dumps(model.handle_embeddings(request)["data"][0]["embedding"][:{numbers}]))"""


def program(facts: PackageFacts, folder: str) -> Snippet:
    """For the most exact of the files that lie in `folder`."""
    path = f"{folder}/{model_file(facts.name, facts.variants[0])}"
    code = (_LOAD + (_TEXT if facts.task.generates else _STATES)).format(
        path=path, context=_CONTEXT, prompt=prompt_of(facts), tokens=TOKENS, numbers=NUMBERS
    )
    return Snippet(Python(), "pip install xllamacpp", code)
