"""A package in Triton's real server under load: throughput and latency against concurrency, every answer compared.

    python tools/bench_triton.py --encoder RUN --decoder RUN

The runs are those of merge-and-export. Of each, a package for the server's Python backend is made and served as it
lies. Clients are threads that wait for an answer before they ask again; with the server they share this machine, so
throughput is that of both.

encoder: `--requests` at each concurrency, over gRPC; the vector of each is compared with the graph's, run alone.
texts: `--texts` at each concurrency, of 32 tokens, over HTTP's generate endpoint; each is compared with the first
answer to its prompt. A wrong answer or an error ends the benchmark with exit code 1; the results are written first.
"""

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from processes import HERE, circumstances, save

from lora_export.contracts import PackageOptions
from lora_export.progress import Silent
from lora_export.workflows.packaging import package

sys.path.insert(0, str(HERE.parent))

TOKENS = 32
SHORTEST, PADDED = 8, 32  # tokens of a request to the encoder, and with its padding: only equal shapes are batched
WITHIN = 1e-4
PROMPTS = ("The capital of France is", "1, 2, 3, 4,", "Water boils at", "Once upon a time")


@dataclass(frozen=True)
class Load:
    """One level of concurrency. errors: requests without an answer; wrong: with another one than alone; runs: of
    the model, for all requests; samples_ms: latency of each request, in the order of the answers."""

    what: str
    concurrency: int
    requests: int
    errors: int
    wrong: int
    seconds: float
    per_second: float
    p50_ms: float
    p99_ms: float
    runs: int
    samples_ms: tuple[float, ...]


Ask = Callable[[int], bool]  # number of a request → whether its answer is right


def load(what: str, clients: Sequence[Ask], requests: int, runs: Callable[[], int]) -> Load:
    """Ask `requests` times, by all clients at once. runs: how often the model has run so far."""
    numbers, lock = iter(range(requests)), threading.Lock()
    samples: list[float] = []
    errors = wrong = 0

    def work(ask: Ask) -> None:
        nonlocal errors, wrong
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            started = time.perf_counter()
            try:
                right = ask(number)
            except Exception as error:  # counted, and told once
                with lock:
                    errors += 1
                    if errors == 1:
                        print(f"{what}: {error}", file=sys.stderr)
                continue
            took = time.perf_counter() - started
            with lock:
                samples.append(1e3 * took)
                wrong += not right

    threads = [threading.Thread(target=work, args=(ask,)) for ask in clients]
    before, started = runs(), time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    p50, p99 = np.percentile(samples, (50, 99)) if samples else (float("nan"),) * 2
    found = Load(
        what, len(clients), requests, errors, wrong, seconds, len(samples) / seconds, float(p50), float(p99),
        runs() - before, tuple(round(s, 3) for s in samples),
    )  # fmt: skip
    print(
        f"  {what}, {found.concurrency} at once: {found.per_second:.1f}/s, p50 {found.p50_ms:.1f} ms, "
        f"p99 {found.p99_ms:.1f} ms, {found.runs} runs, {errors} errors, {wrong} wrong",
        file=sys.stderr,
    )
    return found


def encoder(run: Path, work: Path, levels: Sequence[int], requests: int) -> tuple[str, list[Load]]:
    """The server's version, and a load for each level."""
    import onnxruntime
    import tritonclient.grpc as triton

    from tests.consumers.triton import serving

    folder, name = packed(run, work)
    session = onnxruntime.InferenceSession(folder / name / "1" / "model.onnx" / "model.onnx")
    wanted_name = session.get_outputs()[-1].name
    inputs = [value.name for value in session.get_inputs()]
    random, rows = np.random.default_rng(1), []
    for _ in range(96):
        mask = (np.arange(PADDED) < random.integers(SHORTEST, PADDED + 1)).astype(np.int64)[None]
        ids = random.integers(1000, 20000, (1, PADDED)) * mask
        known = {"input_ids": ids, "attention_mask": mask}
        feeds = {name: known.get(name, np.zeros_like(ids)) for name in inputs}
        rows.append((feeds, session.run([wanted_name], feeds)[0]))

    def client(address: str) -> Ask:
        server = triton.InferenceServerClient(address)

        def ask(number: int) -> bool:
            feeds, wanted = rows[number % len(rows)]
            sent = [triton.InferInput(n, v.shape, "INT64") for n, v in feeds.items()]
            for tensor, value in zip(sent, feeds.values(), strict=True):
                tensor.set_data_from_numpy(value)
            outputs = [triton.InferRequestedOutput(wanted_name)]
            found = server.infer(name, sent, outputs=outputs).as_numpy(wanted_name)
            return found.shape == wanted.shape and float(np.abs(found - wanted).max()) <= WITHIN

        return ask

    with serving(folder, work / "encoder-server", "--log-verbose=0") as server:
        address = f"127.0.0.1:{server.grpc}"
        load("first requests", [client(address)], len(rows), lambda: 0)
        return server.version(), [
            load(
                "encoder", [client(address) for _ in range(level)], requests,
                lambda: int(server.statistics(name)["execution_count"]),
            )
            for level in levels
        ]  # fmt: skip


def texts(run: Path, work: Path, levels: Sequence[int], requests: int) -> list[Load]:
    import json

    from tests.consumers.triton import serving

    folder, name = packed(run, work)
    with serving(folder, work / "decoder-server", "--log-verbose=0") as server:

        def said(prompt: str) -> str:
            document = {"text_input": prompt, "max_tokens": TOKENS}
            status, body = server.post(f"v2/models/{name}-generate/generate", document)
            if status != 200:
                raise RuntimeError(body)
            return str(json.loads(body)["text_output"])

        wanted = [said(prompt) for prompt in PROMPTS]

        def ask(number: int) -> bool:
            return said(PROMPTS[number % len(PROMPTS)]) == wanted[number % len(PROMPTS)]

        asked = f"text of {TOKENS} tokens"
        return [load(asked, [ask] * level, requests, lambda: 0) for level in levels]


def packed(run: Path, work: Path) -> tuple[Path, str]:
    """The package of a run, and the name of its model."""
    folder = work / f"package-{len(list(work.iterdir()))}"
    made = package(run, "triton", folder, PackageOptions(backend="python"), Silent())
    return made.output, made.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True, help="a run of an embedder")
    parser.add_argument("--decoder", type=Path, required=True, help="a run of a decoder")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=10_000, help="to the encoder, at each concurrency")
    parser.add_argument("--texts", type=int, default=32, help="at each concurrency")
    parser.add_argument("--json", type=Path, help="result file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-triton-") as folder:
        work = Path(folder)
        about = circumstances(work, work)
        version, found = encoder(options.encoder, work, options.concurrency, options.requests)
        found += texts(options.decoder, work, options.concurrency, options.texts)
    from tests.consumers.triton import PACKAGES

    document = {**about, "server": version, "installed": PACKAGES, "loads": [asdict(one) for one in found]}
    save(options.json, "triton", document)
    if any(one.errors or one.wrong for one in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
