"""A package, checked where it arrived: its files, its signature, its graphs, and the answer of its runtime."""

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_export import allowed
from lora_export.contracts import Finding, Progress, Verification
from lora_export.errors import InputError, LoraExportError
from lora_export.packages import archive, code, contents, signature
from lora_export.packages.job import Drawing, PackageFacts
from lora_export.packages.pipelines.programs import EQUAL, EXACT, LEAST_PSNR, STEP
from lora_export.storage import sealed
from lora_export.workflows import confined, gguf

MODEL_SHARE = 6  # bytes of memory per byte of a package: fp16 is computed in fp32, and weights are packed again
_EXACT = frozenset({"fp32", "float32"})  # precisions in which a runtime must answer as the unmerged model does
_UNSIGNED = "who made it: it is not signed, and anybody who changes a file can also rewrite the manifest"


def is_package(path: Path) -> bool:
    """Whether this is the folder or the archive of a package."""
    return (path.is_file() and archive.kind_of(path) is not None) or contents.is_package(path)


def verify(path: Path, key: Path | None, run: bool, runtime: Path | None, progress: Progress) -> Verification:
    """Check a package, a folder or an archive.

    key: the public key of its signer, in PEM; run: have its runtime answer the sample; runtime: where that is, if
    not in this environment: a Python interpreter, or for transformers.js a folder with node_modules.
    """
    with _folder(path) as folder:
        progress.stage("verify: checking every file of the package")
        try:
            manifest = contents.read(folder)
        except InputError as error:
            return Verification((Finding("manifest", False, f"{error.found} ({contents.NAME})"),))
        checks = [Finding("manifest", True, "complete, and matches its digest")]
        checks += contents.compare(folder, manifest)
        not_checked = []
        if key is not None:
            checks.append(signature.verify(folder, key))
        elif (folder / contents.SIGNATURE).is_file():
            not_checked.append(f"the signature {contents.SIGNATURE}: give the public key of its signer (--key)")
        else:
            not_checked.append(_UNSIGNED)
        if all(c.passed for c in checks):
            checks += _allowed(folder, manifest)
        if all(c.passed for c in checks):
            checks += _graphs(folder)
        about: dict[str, Any] = {"signature": _signature(folder, key, checks)}
        if not run:
            not_checked.append("whether its runtime runs it: add --run")
        elif all(c.passed for c in checks):  # nothing that was tampered with is run
            if about["signature"] != "verified":
                progress.warn(f"{_WARNINGS[about['signature']]}: a runtime will read files of unknown origin")
            finding, network = _answer(folder, contents.facts_of(folder, manifest), runtime, progress)
            checks.append(finding)
            about["network_of_run"] = network
        return Verification(tuple(checks), tuple(not_checked), about)


def _signature(folder: Path, key: Path | None, checks: Sequence[Finding]) -> str:
    if key is not None:
        return "verified" if all(c.passed for c in checks if c.name == "signature") else "refused"
    return "not checked" if (folder / contents.SIGNATURE).is_file() else "none"


_WARNINGS = {
    "none": "the package is not signed",
    "not checked": "the signature of the package was not checked (--key)",
    "refused": "the signature of the package was not made with this key",
}


def _allowed(folder: Path, manifest: contents.PackageManifest) -> list[Finding]:
    """Whether its files are of known types, and its configuration sets nothing but what is allowed."""
    try:
        facts = contents.facts_of(folder, manifest)
        allowed.check_package(folder, code.names(facts))
        code.check(folder, facts)
        facts.target.check_folder(folder)
        gguf.check_files(folder, facts.name)
    except LoraExportError as error:
        where = f" ({error.where})" if error.where else ""
        return [Finding("contents", False, f"{error.found}{where}")]
    return [Finding("contents", True, "known types of files, and only allowed settings")]


@contextmanager
def _folder(path: Path) -> Iterator[Path]:
    """The folder of a package; an archive is unpacked into a temporary one."""
    if path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="lora-export-") as folder:
        archive.extract(path, Path(folder))
        yield Path(folder)


def _graphs(folder: Path) -> list[Finding]:
    """Whether each graph is valid, whatever its name, and has its weights in regular files beside it."""
    from lora_export.onnx_export import check_model
    from lora_export.onnx_export.graphs.finding import find_graphs

    findings = []
    try:
        graphs = find_graphs(folder)
    except LoraExportError as error:
        return [Finding("graphs", False, f"{Path(error.where or folder).name}: {error.found}")]
    for path in graphs:
        try:
            check_model(path)
        except LoraExportError as error:
            name = path.relative_to(folder).as_posix()
            findings.append(Finding("graphs", False, f"{name}: {error.found}"))
    if not findings and graphs:
        findings.append(Finding("graphs", True, f"{len(graphs)} valid, with their weights in files beside them"))
    return findings


def refuse_other_answer(folder: Path, facts: PackageFacts, progress: Progress) -> None:
    """InputError unless the package in `folder` answers the sample as the unmerged model does."""
    finding, _ = _answer(folder, facts, None, progress)
    if not finding.passed:
        raise InputError(
            f"the export with slots is not the model of this run: {finding.note}",
            expected="an export of the same base, with the run's adapter beside it",
            next_step="lora-export export -m BASE -a ADAPTER -o EXPORT",
        )


# --- running it --------------------------------------------------------------------------------------------


def _answer(folder: Path, facts: PackageFacts, runtime: Path | None, progress: Progress) -> tuple[Finding, str]:
    """The runtime's answer to the sample compared with the unmerged model's; and 'none', or why the program had a
    network."""
    progress.stage(f"verify: {facts.target.name} runs the package without a network")
    snippet = facts.target.check(facts, str(folder.resolve()))
    memory = confined.MEMORY + MODEL_SHARE * sum(sealed.sizes(folder).values())
    # Python imports from the folder that it is started in.
    with tempfile.TemporaryDirectory(prefix="lora-export-") as empty:
        command, place = snippet.interpreter.start(runtime, Path(empty))
        try:
            done = confined.run(command, snippet.code, place, memory=memory)
        except (OSError, InputError) as error:
            return Finding("runs", False, f"{command[0]} did not run: {error}"), "none"
    if done.network != "none":
        progress.warn(f"the program of the package ran with the network of this machine: {done.network}")
    return _read_answer(done, facts), done.network


def _read_answer(done: confined.Outcome, facts: PackageFacts) -> Finding:
    if done.code is None:
        return Finding("runs", False, f"its program was stopped after {confined.SECONDS} s")
    if done.code != 0:
        return Finding("runs", False, f"its program failed: {_reason(done.stderr)}")
    try:
        answer: Any = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError, RecursionError):
        return Finding("runs", False, f"its program printed {done.stdout[-200:]!r} instead of an answer")
    return _judged(answer, facts)


def _reason(stderr: str) -> str:
    """The most telling line: the first with an error, otherwise the last."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "error" in line]
    return (errors or lines or ["it printed nothing"])[-1]


def _judged(answer: Any, facts: PackageFacts) -> Finding:
    sample = facts.sample
    if sample is None:
        return Finding("runs", bool(answer or answer == ""), "its runtime loads it and answers")
    if sample.drawing is not None:
        return _judged_picture(answer, sample.drawing)
    wanted = sample.text if sample.text is not None else list(sample.numbers)
    same = _same(answer, wanted, facts.target.relative)
    who = "the unmerged model" if sample.text is not None else "the validated graph"
    if same:
        return Finding("runs", True, f"its runtime answers the sample as {who} does")
    if facts.precision in _EXACT:
        return Finding("runs", False, f"its runtime answers the sample with {answer!r}, and {who} with {wanted!r}")
    is_answer = isinstance(answer, str) and bool(answer) if sample.text is not None else _finite(answer)
    return Finding("runs", is_answer, f"its runtime answers, in {facts.precision} differently from {who}")


def _judged_picture(answer: Any, drawing: Drawing) -> Finding:
    """What the program printed: how close its picture comes to the packed one, in dB."""
    whose = f"the picture of the validated {drawing.precision} graphs"
    if answer == EQUAL:
        return Finding("runs", True, f"its runtime draws {whose}, pixel by pixel")
    if isinstance(answer, bool) or not _finite([answer]):
        return Finding("runs", False, f"its program printed {answer!r} instead of a PSNR")
    if drawing.precision != EXACT:
        why = "whose rounding depends on the processor and its library, so no limit is set"
        return Finding("runs", True, f"its runtime draws a picture, {answer:g} dB from {whose}, {why}")
    limit = f"at least {LEAST_PSNR:g} dB: {STEP}"
    return Finding(
        "runs", answer >= LEAST_PSNR, f"its runtime draws a picture, {answer:g} dB from {whose} ({limit})"
    )


def _same(answer: Any, wanted: str | Sequence[float], relative: float) -> bool:
    if isinstance(wanted, str):
        # The sample continues after an end of text, and a runtime stops there; both have a limit of tokens.
        return isinstance(answer, str) and bool(answer) and (wanted.startswith(answer) or answer.startswith(wanted))
    if not _finite(answer) or not _finite(list(wanted)) or len(answer) != len(wanted):
        return False
    scale = max(abs(x) for x in wanted)
    return all(abs(a - b) <= relative * scale for a, b in zip(answer, wanted, strict=True))


def _finite(answer: Any) -> bool:
    numbers = isinstance(answer, list) and bool(answer) and all(isinstance(x, int | float) for x in answer)
    return numbers and all(map(math.isfinite, answer))
