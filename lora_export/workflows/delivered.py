"""A package, checked again where it arrived: its files, its signature, its graphs, and what its runtime says."""

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
from lora_export.packages import archive, contents, signature
from lora_export.packages.job import PackageFacts
from lora_export.packages.targets import target_named
from lora_export.storage import sealed
from lora_export.workflows import confined

MODEL_SHARE = 6  # bytes of memory for each byte of a package: fp16 is computed in fp32, and packed anew
RELATIVE = 1e-3  # of the largest number of a sample: another order of additions, in fp32
_EXACT = frozenset({"fp32", "float32"})  # precisions in which a runtime must say what the unmerged model says
_UNSIGNED = "who made it: it is not signed, and whoever changes a file can write another manifest"


def is_package(path: Path) -> bool:
    """Whether this is the folder or the archive of a package."""
    return (path.is_file() and archive.kind_of(path) is not None) or contents.is_package(path)


def verify(path: Path, key: Path | None, run: bool, runtime: Path | None, progress: Progress) -> Verification:
    """Check a package, a folder or an archive.

    key: the public key of who signed it, in PEM; run: have its runtime generate; runtime: where that is, if not in
    this environment: a Python interpreter, or for transformers.js a folder with node_modules.
    """
    with _folder(path) as folder:
        progress.stage("verify: every file of the package")
        try:
            manifest = contents.read(folder)
        except InputError as error:
            return Verification((Finding("manifest", False, f"{error.found} ({contents.NAME})"),))
        checks = [Finding("manifest", True, "complete, and agrees with its own digest")]
        checks += contents.compare(folder, manifest)
        not_checked = []
        if key is not None:
            checks.append(signature.verify(folder, key))
        elif (folder / contents.SIGNATURE).is_file():
            not_checked.append(f"the signature {contents.SIGNATURE}: give the public key of who signed it (--key)")
        else:
            not_checked.append(_UNSIGNED)
        if all(c.passed for c in checks):
            checks += _allowed(folder, manifest.target)
        if all(c.passed for c in checks):
            checks += _graphs(folder)
        about: dict[str, Any] = {"signature": _signature(folder, key, checks)}
        if not run:
            not_checked.append("whether its runtime runs it: --run")
        elif all(c.passed for c in checks):  # nothing that was tampered with is run
            if about["signature"] != "verified":
                progress.warn(f"{_WARNINGS[about['signature']]}: --run has a runtime read files of unknown origin")
            finding, network = _said(folder, contents.facts_of(folder, manifest), runtime, progress)
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
    "refused": "the signature of the package is not that of the key",
}


def _allowed(folder: Path, target: str) -> list[Finding]:
    """Whether its files are of known types, and its configuration says only what a runtime may be told."""
    chosen = target_named(target)
    try:
        allowed.check_package(folder, chosen.file_names)
        chosen.check_folder(folder)
    except LoraExportError as error:
        where = f" ({error.where})" if error.where else ""
        return [Finding("contents", False, f"{error.found}{where}")]
    return [Finding("contents", True, "known types of files, and settings that are on the lists of their runtimes")]


@contextmanager
def _folder(path: Path) -> Iterator[Path]:
    """The folder of a package; an archive is unpacked for the time being."""
    if path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="lora-export-") as folder:
        archive.extract(path, Path(folder))
        yield Path(folder)


def _graphs(folder: Path) -> list[Finding]:
    """Whether each graph is valid, whatever it is called, and its weights lie in plain files beside it."""
    from lora_export.onnx_export import check_model
    from lora_export.onnx_export.graphs.finding import find_graphs

    found = []
    try:
        graphs = find_graphs(folder)
    except LoraExportError as error:
        return [Finding("graphs", False, f"{Path(error.where or folder).name}: {error.found}")]
    for path in graphs:
        try:
            check_model(path)
        except LoraExportError as error:
            name = path.relative_to(folder).as_posix()
            found.append(Finding("graphs", False, f"{name}: {error.found}"))
    if not found and graphs:
        found.append(Finding("graphs", True, f"{len(graphs)} valid, with their weights in files beside them"))
    return found


def refuse_other_words(folder: Path, facts: PackageFacts, progress: Progress) -> None:
    """InputError unless what lies in `folder` says to the sample what the unmerged model says."""
    found, _ = _said(folder, facts, None, progress)
    if not found.passed:
        raise InputError(
            f"the export with slots is not the model of this run: {found.note}",
            expected="an export of the same base, with the adapter of the run beside it",
            next_step="lora-export export -m BASE -a ADAPTER -o EXPORT",
        )


# --- running it --------------------------------------------------------------------------------------------


def _said(folder: Path, facts: PackageFacts, runtime: Path | None, progress: Progress) -> tuple[Finding, str]:
    """What the package's runtime says to the sample, beside what the unmerged model says; and whether it had a
    network: 'none', or why."""
    progress.stage(f"verify: {facts.target.name} runs the package, without a network")
    snippet = facts.target.check(facts, str(folder.resolve()))
    memory = confined.MEMORY + MODEL_SHARE * sum(sealed.sizes(folder).values())
    with tempfile.TemporaryDirectory(prefix="lora-export-") as empty:  # Python imports from where it is started
        command, place = snippet.interpreter.start(runtime, Path(empty))
        try:
            done = confined.run(command, snippet.code, place, memory=memory)
        except (OSError, InputError) as error:
            return Finding("runs", False, f"{command[0]} did not run: {error}"), "none"
    if done.network != "none":
        progress.warn(f"the program of the package ran with the network of this machine: {done.network}")
    return _heard(done, facts), done.network


def _heard(done: confined.Outcome, facts: PackageFacts) -> Finding:
    if done.code is None:
        return Finding("runs", False, f"its program was ended after {confined.SECONDS} s")
    if done.code != 0:
        return Finding("runs", False, f"its program failed: {_reason(done.stderr)}")
    try:
        said: Any = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError, RecursionError):
        return Finding("runs", False, f"its program printed no answer, but {done.stdout[-200:]!r}")
    return _judged(said, facts)


def _reason(stderr: str) -> str:
    """The line that says most: the last of a Python traceback, the first error of Node."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "error" in line]
    return (errors or lines or ["it said nothing"])[-1]


def _judged(said: Any, facts: PackageFacts) -> Finding:
    sample = facts.sample
    if sample is None:
        return Finding("runs", bool(said or said == ""), "its runtime loads it and answers")
    wanted = sample.text if sample.text is not None else list(sample.numbers)
    same = _same(said, wanted)
    who = "the unmerged model" if sample.text is not None else "the validated graph"
    if same:
        return Finding("runs", True, f"its runtime says to the sample what {who} says")
    if facts.precision in _EXACT:
        return Finding("runs", False, f"its runtime says {said!r} to the sample, and {who} {wanted!r}")
    answered = isinstance(said, str) and bool(said) if sample.text is not None else _finite(said)
    return Finding("runs", answered, f"its runtime answers, in {facts.precision} not as {who} does")


def _same(said: Any, wanted: str | Sequence[float]) -> bool:
    if isinstance(wanted, str):
        # The sample goes on beyond an end of text, a runtime stops there; and neither is longer than its limit.
        return isinstance(said, str) and bool(said) and (wanted.startswith(said) or said.startswith(wanted))
    if not _finite(said) or not _finite(list(wanted)) or len(said) != len(wanted):
        return False
    scale = max(abs(x) for x in wanted)
    return all(abs(a - b) <= RELATIVE * scale for a, b in zip(said, wanted, strict=True))


def _finite(said: Any) -> bool:
    numbers = isinstance(said, list) and bool(said) and all(isinstance(x, int | float) for x in said)
    return numbers and all(map(math.isfinite, said))
