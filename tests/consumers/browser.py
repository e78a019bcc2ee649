"""A page in headless Chromium, served from here: modules of npm, packages, and a program that answers."""

import json
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from tests.consumers.environments import node_folder

ASK = Path(__file__).with_name("ask.mjs")
_CHROMIUM = (
    "chromium", "--headless", "--no-sandbox", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
_WITHOUT_GPU = ("--disable-gpu",)
# SwiftShader, which computes on the processor what a graphics card would.
_SOFTWARE_ADAPTER = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")

_PAGE = """<!doctype html><script type="module">
const log = [];
for (const name of ["log", "info", "warn", "error", "debug"]) {
  console[name] = (...words) => log.push(words.map(String).join(" "));
}
const done = (value) => fetch("/done", { method: "POST", body: JSON.stringify({ ...value, log }) });
try {
  const { default: run } = await import("/program.mjs");
  const given = await (await fetch("/given.json")).json();
  await done({ answer: await run(given) });
} catch (error) { await done({ error: String(error?.stack ?? error) }); }
</script>"""

# The software adapter has subgroups of 4, for which onnxruntime-web's attention of long prompts is wrong from the
# fifth token on. A page without subgroups takes another kernel, which is right.
_WITHOUT_SUBGROUPS = """<script>
const without = (names) => [...(names ?? [])].filter((name) => !name.startsWith("subgroup"));
for (const kind of [GPUAdapter, GPUDevice]) {
  const own = Object.getOwnPropertyDescriptor(kind.prototype, "features").get;
  Object.defineProperty(kind.prototype, "features", { get() { return new Set(without(own.call(this))); } });
}
const request = GPUAdapter.prototype.requestDevice;
GPUAdapter.prototype.requestDevice = function (asked) {
  return request.call(this, { ...asked, requiredFeatures: without(asked?.requiredFeatures) });
};
</script>"""

_WATCH = """<script>
const post = (value) => fetch("/done", { method: "POST", body: JSON.stringify(value) });
window.addEventListener("unhandledrejection", (event) => post({ error: String(event.reason?.stack) }));
const watch = setInterval(() => {
  try {
    const said = JSON.parse(document.body.textContent);
    clearInterval(watch);
    post(said);
  } catch { /* not yet */ }
}, 100);
</script>"""

_TRANSFORMERS_JS = """
import * as library from "/js/@huggingface/transformers/dist/transformers.min.js";
import { ask } from "/ask.mjs";
export default async (given) => {
  const { env } = library;
  Object.assign(env, { allowRemoteModels: false, allowLocalModels: true, localModelPath: "/" });
  env.useBrowserCache = false;
  Object.assign(env.backends.onnx.wasm, { wasmPaths: "/js/onnxruntime-web/dist/", numThreads: given.threads });
  if (given.verbose) {
    env.backends.onnx.logLevel = "verbose";
    if ("logLevel" in env) env.logLevel = 10;
  }
  return await ask(library, { ...given, place: "package" });
};
"""


@dataclass(frozen=True)
class Visit:
    """What a page answered, and what it wrote to its console."""

    answer: Any
    log: tuple[str, ...]


def visit(program: str, given: Any, folders: Mapping[str, Path], webgpu: bool = False, seconds: int = 300) -> Visit:
    """What the default function of a module answers to `given` in a page.

    folders: by the first name of their addresses, beside js, the installed modules; webgpu: with the software
    adapter.
    """
    files = {
        "": _prepared(_PAGE, webgpu),
        "program.mjs": program,
        "given.json": json.dumps(given),
        "ask.mjs": ASK.read_text(),
    }
    said = opened(files, {"js": node_folder() / "node_modules", **folders}, webgpu, seconds)
    assert "error" not in said, (said["error"], said["log"][-5:])
    return Visit(said["answer"], tuple(said["log"]))


def shown(page: str, folders: Mapping[str, Path], webgpu: bool = False, seconds: int = 300) -> Any:
    """The JSON that a page puts into its body."""
    return opened({"": _prepared(page, webgpu) + _WATCH}, folders, webgpu, seconds)


def _prepared(page: str, webgpu: bool) -> str:
    return (_WITHOUT_SUBGROUPS if webgpu else "") + page


def opened(files: Mapping[str, str], folders: Mapping[str, Path], webgpu: bool, seconds: int) -> Any:
    """What a page posts to /done. files: texts by their addresses, the page's own being empty."""
    # Chromium's processes end a moment later than the first, and write until then.
    profiles = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with _served(files, folders) as (address, came), profiles as profile:
        flags = _SOFTWARE_ADAPTER if webgpu else _WITHOUT_GPU
        command = [*_CHROMIUM, *flags, f"--user-data-dir={profile}", address]
        seen = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            env=os.environ | {"TMPDIR": profile},
        )  # fmt: skip
        try:
            return came.get(timeout=seconds)
        except Empty:
            raise AssertionError(f"the page gave no answer in {seconds} s") from None
        finally:
            os.killpg(seen.pid, signal.SIGKILL)
            seen.wait()


def transformers_js(package: Path, given: Mapping[str, Any], webgpu: bool = False, **more: Any) -> Visit:
    """What transformers.js answers in a page, as ask.mjs asks it. On WASM, or on WebGPU as well."""
    settings = {"threads": 1, **given}
    return visit(_TRANSFORMERS_JS, settings, {"package": package}, webgpu, **more)


@contextmanager
def _served(files: Mapping[str, str], folders: Mapping[str, Path]) -> Iterator[tuple[str, "Queue[Any]"]]:
    """A server's address, and the queue of what pages post to it. Pages are isolated, so that threads work."""
    came: Queue[Any] = Queue()

    class Handler(SimpleHTTPRequestHandler):
        extensions_map = {  # noqa: RUF012 - as the base class has it
            **SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript", ".wasm": "application/wasm",
        }  # fmt: skip

        def translate_path(self, path: str) -> str:
            _, first, *rest = path.partition("?")[0].split("/")
            return str(folders.get(first, Path("/nonexistent")).joinpath(*rest))

        def end_headers(self) -> None:
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
            super().end_headers()

        def do_GET(self) -> None:
            text = files.get(self.path.lstrip("/"))
            if text is None:
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Type", self.guess_type(self.path) if self.path != "/" else "text/html")
            self.end_headers()
            self.wfile.write(text.encode())
            return None

        def do_POST(self) -> None:
            came.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *words: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", came
    finally:
        server.shutdown()
