"""Triton's real server, which nvidia-pytriton brings along: started on free ports, asked, stopped.

It has the Python backend alone. `backends/onnxruntime` beside this file is the other one that packages need.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.consumers.environments import installed

# With numpy 2, the server's Python backend returns empty outputs.
PACKAGES = (
    "nvidia-pytriton==0.7.0", "numpy==1.26.4", "onnxruntime==1.32.0", "tokenizers==0.23.3", "transformers==5.24.0",
    "tritonclient[http,grpc]==2.73.0",
)  # fmt: skip
SECONDS = 180  # in which a server starts
_BACKENDS = Path(__file__).parent / "backends"
# Starts a command that is ended by SIGTERM when this process ends, however that happens (prctl, PR_SET_PDEATHSIG).
_LEASHED = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
# Of the server's Python, which reads no variables of the environment: a package that lies on a writable disk stays
# as it is.
_SITE = "import sys\nsys.dont_write_bytecode = True\n"


def triton_python() -> Path:
    """The interpreter of an environment with tritonserver 2.51, its clients and what its models import."""
    found = installed("triton", PACKAGES)
    (_home(found).parents[1] / "sitecustomize.py").write_text(_SITE)
    return found


class NotStarted(RuntimeError):
    """The server ended instead of starting. Its words: the end of its log."""


@dataclass(frozen=True)
class Server:
    """A server that is ready. http, grpc: ports of 127.0.0.1."""

    process: subprocess.Popen[bytes]
    http: int
    grpc: int
    log: Path

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.http}"

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.address}/{path}", timeout=30) as answer:
            return json.loads(answer.read() or b"null")

    def post(self, path: str, document: Any) -> tuple[int, str]:
        """Status and body."""
        sent = urllib.request.Request(f"{self.address}/{path}", json.dumps(document).encode())
        try:
            with urllib.request.urlopen(sent, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def version(self) -> str:
        return str(self.get("v2")["version"])

    def statistics(self, model: str) -> dict[str, Any]:
        """How many requests a model answered (inference_count), and in how many runs (execution_count)."""
        (found,) = self.get(f"v2/models/{model}/stats")["model_stats"]
        return dict(found)


@contextlib.contextmanager
def serving(repository: Path, work: Path, *words: str) -> Iterator[Server]:
    """A server of the models in `repository`. work: an empty folder; words: further options of the server.

    NotStarted if it does not start. Whatever happens, no process of it is left.
    """
    interpreter = triton_python()
    ports = _free_ports(2)
    work.mkdir(parents=True, exist_ok=True)
    log = work / "server.log"
    command = [
        sys.executable, "-c", _LEASHED,
        str(_home(interpreter) / "bin" / "tritonserver"), f"--model-repository={repository}",
        f"--backend-directory={_backends(interpreter, work)}", "--http-address=127.0.0.1",
        f"--http-port={ports[0]}", "--grpc-address=127.0.0.1", f"--grpc-port={ports[1]}", "--allow-metrics=false",
        "--exit-timeout-secs=5", "--log-verbose=1",
        f"--backend-config=python,shm-region-prefix-name=lora-export-{os.getpid()}-{ports[0]}", *words,
    ]  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=_environment(interpreter), cwd=work, start_new_session=True
        )
    try:
        server = Server(process, *ports, log)
        _wait(server)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the processes of its Python models
        process.wait()


def _home(interpreter: Path) -> Path:
    (found,) = interpreter.parents[1].glob("lib/python3*/site-packages/pytriton/tritonserver")
    return found


def _backends(interpreter: Path, work: Path) -> Path:
    """The server's own backends with the stub for this Python, and ours."""
    made, version = work / "backends", _home(interpreter).parents[2].name.removeprefix("python")
    if not made.is_dir():
        shutil.copytree(_home(interpreter) / "backends", made)
        stub = _home(interpreter) / "python_backend_stubs" / version / "triton_python_backend_stub"
        shutil.copy(stub, made / "python" / stub.name)
        shutil.copytree(_BACKENDS, made, dirs_exist_ok=True)
    return made


def _environment(interpreter: Path) -> dict[str, str]:
    site = _home(interpreter).parents[1]
    asked = "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"
    python = subprocess.run([interpreter, "-c", asked], capture_output=True, text=True, check=True).stdout.strip()
    libraries = ":".join(
        filter(None, [str(site / "nvidia_pytriton.libs"), python, os.environ.get("LD_LIBRARY_PATH")])
    )
    path = f"{interpreter.parent}:{os.environ['PATH']}"
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return kept | {"PATH": path, "LD_LIBRARY_PATH": libraries}


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in found]


def _wait(server: Server) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if server.process.poll() is not None:
            break
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{server.address}/v2/health/ready", timeout=5):
            return
        time.sleep(0.2)
    log = server.log.read_text(errors="replace")
    told = [line for line in log.splitlines() if line.startswith("E") or "UNAVAILABLE" in line]
    raise NotStarted("\n".join([*told, log[-500:]]))
