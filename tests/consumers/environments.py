"""Runtimes that are no part of this project's environment, installed once into .cache/consumers."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CACHE = Path(os.environ.get("LORA_EXPORT_CACHE", Path(__file__).parents[2] / ".cache")) / "consumers"
OPTIMUM = ("torch==2.13.0", "optimum-onnx==0.1.0", "transformers==4.57.6", "onnxruntime==1.32.0")
DIFFUSION = (*OPTIMUM, "diffusers==0.39.0", "sentencepiece", "protobuf")
SENTENCES = (*OPTIMUM, "sentence-transformers==5.7.0", "fastembed==0.9.1")
TRANSFORMERS_JS = "@huggingface/transformers@4.3.0"
_CHROMIUM = (
    "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def optimum_python() -> Path:
    """The interpreter of an environment with optimum-onnx 0.1.0 and transformers 4.57."""
    return installed("optimum", OPTIMUM)


def diffusion_python() -> Path:
    """The interpreter of an environment with optimum-onnx 0.1.0, transformers 4.57 and diffusers 0.39."""
    return installed("optimum-diffusion", DIFFUSION)


def sentence_python() -> Path:
    """The interpreter of an environment with sentence-transformers, its ONNX backend, and fastembed."""
    return installed("sentence-transformers", SENTENCES)


def installed(name: str, packages: Sequence[str], without: Sequence[str] = ()) -> Path:
    """The interpreter of an environment of its own. without: what pip brings along and nothing here runs."""
    place = CACHE / name
    ready, wanted = place / ".ready", "\n".join([*packages, *(f"without {w}" for w in without)])
    if not ready.is_file() or ready.read_text() != wanted:
        pip = [place / "bin" / "python", "-m", "pip"]
        subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
        subprocess.run([*pip, "install", "--quiet", *packages], check=True)
        if without:
            subprocess.run([*pip, "uninstall", "--quiet", "--yes", *without], check=True)
        ready.write_text(wanted)
    return place / "bin" / "python"


def version(interpreter: Path, package: str) -> str:
    """The version of a package in an environment."""
    asked = f"import importlib.metadata as m, json; print(json.dumps(m.version({package!r})))"
    return str(python(interpreter, asked))


def node_folder() -> Path:
    """A folder with transformers.js in its node_modules, installed without any install script."""
    place = CACHE / "js"
    if not (place / "node_modules" / "@huggingface").is_dir():
        place.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--ignore-scripts", "--prefix", str(place), TRANSFORMERS_JS]
        subprocess.run(command, check=True, capture_output=True)
    return place


def python(interpreter: Path, code: str) -> Any:
    """The last line that a program prints, as JSON."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [interpreter, "-"], input=code, capture_output=True, text=True, check=False, env=environment,
        cwd=tempfile.gettempdir(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def node(code: str) -> Any:
    done = subprocess.run(
        ["node", "--input-type=module", "-"], input=code, capture_output=True, text=True, check=False,
        cwd=node_folder(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


_PAGE = """<!doctype html><script type="module">
const answer = (value) => fetch("/answer", { method: "POST", body: JSON.stringify(value) });
try {
  const { AutoTokenizer, AutoModel, env } = await import("/js/@huggingface/transformers/dist/transformers.min.js");
  Object.assign(env, { allowRemoteModels: false, allowLocalModels: true });
  Object.assign(env, { localModelPath: "/", useBrowserCache: false });
  Object.assign(env.backends.onnx.wasm, { wasmPaths: "/js/onnxruntime-web/dist/", numThreads: 1 });
  const reader = await AutoTokenizer.from_pretrained("package");
  const model = await AutoModel.from_pretrained("package", OPTIONS);
  const out = Object.values(await model(await reader(PROMPT)))[0];
  await answer(Array.from(out.data.slice(0, 8)));
} catch (error) { await answer({ error: String(error.stack ?? error) }); }
</script>"""


def browser(package: Path, prompt: str, options: dict[str, str]) -> Any:
    """What a page that is served from here gets of a package in headless Chromium, on WASM."""
    page = _PAGE.replace("OPTIONS", json.dumps(options)).replace("PROMPT", json.dumps(prompt))
    answers: list[Any] = []
    came = threading.Event()

    class Handler(SimpleHTTPRequestHandler):
        extensions_map = {  # noqa: RUF012 - as the base class has it
            **SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript", ".wasm": "application/wasm",
        }  # fmt: skip

        def translate_path(self, path: str) -> str:
            _, first, *rest = path.partition("?")[0].split("/")
            home = {"js": node_folder() / "node_modules", "package": package}.get(first, Path("/nonexistent"))
            return str(home.joinpath(*rest))

        def do_GET(self) -> None:
            if self.path != "/":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())
            return None

        def do_POST(self) -> None:
            answers.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            came.set()

        def log_message(self, *words: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as profile:
        address = f"http://127.0.0.1:{server.server_port}/"
        seen = subprocess.Popen([*_CHROMIUM, f"--user-data-dir={profile}", address], stderr=subprocess.DEVNULL)
        try:
            assert came.wait(300), "the page gave no answer"
        finally:
            seen.kill()
            seen.wait()
            server.shutdown()
    return answers[0]
