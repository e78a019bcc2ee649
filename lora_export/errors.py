"""What can go wrong, in words that a person can act on, with the exit code for scripts."""

from collections.abc import Sequence
from pathlib import Path

from lora_export.escape import shown

EXIT_FAILED = 1
EXIT_GATE = 3
EXIT_INTERRUPTED = 130
FAULTS_SHOWN = 25  # of a jobs file, in a message
LONGEST = 2000  # characters of one part of a message; a name in a file may be longer than a screen


class LoraExportError(Exception):
    """A refusal or failure, reported in plain words without a traceback (exit code 1).

    found: what is there; where: file and tensor; expected: what would be right; next_step: a command to try.
    All of them may quote a file, so they are stored as `plain` text.
    """

    exit_code = EXIT_FAILED

    def __init__(
        self,
        found: str,
        *,
        where: str | Path | None = None,
        tensor: str | None = None,
        expected: str | None = None,
        next_step: str | None = None,
    ) -> None:
        self.found: str = plain(found)
        self.where: str | None = plain(str(where)) if where is not None else None
        self.tensor: str | None = plain(tensor) if tensor is not None else None
        self.expected: str | None = plain(expected) if expected is not None else None
        self.next_step: str | None = plain(next_step) if next_step is not None else None
        super().__init__(self.message())

    def message(self) -> str:
        lines = [self.found]
        for label, text in (
            ("file", self.where),
            ("tensor", self.tensor),
            ("expected", self.expected),
            ("try", self.next_step),
        ):
            if text:
                lines.append(f"  {label + ':':<10}{text}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, str | None]:
        return {
            "error": type(self).__name__,
            "found": self.found,
            "where": self.where,
            "tensor": self.tensor,
            "expected": self.expected,
            "next": self.next_step,
        }


def plain(text: str) -> str:
    """The text as `shown` on one line, truncated if it is too long."""
    return shown(f"{text[:LONGEST]}…" if len(text) > LONGEST else text)


class InputError(LoraExportError):
    """A path, option or file that cannot be what it is given as.

    Cause: a folder that does not exist or is of another kind, options that exclude each other, a damaged document.
    Cure: `lora-export inspect PATH` says what a folder is; the error names the options, and which to drop.
    """


class JobsError(InputError):
    """All faults of a jobs file at once.

    Cause: keys that no option has, values that an option does not take, rows without a base or with the same name.
    Cure: each fault names its line and key; `lora-export fleet JOBS -o ROOT --dry-run` says when none is left.
    """

    def __init__(self, path: Path, faults: Sequence[str]) -> None:
        self.faults: tuple[str, ...] = tuple(faults)
        super().__init__(
            f"{len(faults)} faults in the jobs file",
            where=path,
            expected="a jobs file without any, before the first row is worked on",
            next_step=f"correct them, and lora-export fleet {path.name} -o ROOT --dry-run",
        )

    def message(self) -> str:
        lines = [f"  {n}. {fault}" for n, fault in enumerate(self.faults[:FAULTS_SHOWN], 1)]
        left = len(self.faults) - FAULTS_SHOWN
        return "\n".join([super().message(), *lines, *([f"  … and {left} more, which --json lists"] * (left > 0))])

    def as_json(self) -> dict[str, str | None]:
        return {**super().as_json(), "faults": list(self.faults)}  # type: ignore[dict-item]


class CheckpointError(LoraExportError):
    """A safetensors file, index or config that is damaged, unsafe or not understood.

    Cause: a truncated download, a header that does not fit its file, a pickle, keys that would run code, NaN.
    Cure: download the file again; convert pickles to safetensors elsewhere; `--allow-nonfinite` if NaN is intended.
    """


class AdapterError(LoraExportError):
    """An adapter that cannot be merged, or not into this base.

    Cause: it was trained on another base, no merged weight can equal its kind, or its tensors match nothing.
    Cure: `lora-export inspect -a ADAPTER -b BASE` shows what fits; give the base that adapter_config.json names.
    """


class OutputError(LoraExportError):
    """The output cannot be written: it exists, is held by another process, or does not fit.

    Cause: an output that exists already, a second writer, a full disk, an output inside an input.
    Cure: `--force` replaces an output as a whole; otherwise choose another `-o`. An earlier output is unchanged.
    """


class ExportError(LoraExportError):
    """No engine can export this model, or the engine failed.

    Cause: an architecture or precision that no engine supports, an earlier export of another base, a faulty graph.
    Cure: try another `--precision` or `--engine`; without `--graph-from` the model gets a graph of its own.
    """


class RuntimeUnavailable(LoraExportError):
    """A requested execution provider or library does not work here.

    Cause: CUDA libraries are missing or of another version, there is no GPU, a runtime is not installed.
    Cure: `lora-export env` shows what works and which library is missing; `--provider cpu` measures the CPU.
    """


class WorkerLost(LoraExportError):
    """A process of a fleet that died or took too long, with the row that it was doing.

    Cause: not enough memory, a crash in a library, a row that takes longer than `--timeout`, somebody's kill.
    Cure: run the same command again, which does what is missing, with fewer `--workers` or a longer `--timeout`.
    """


class GateFailed(LoraExportError):
    """The result was made but failed its checks (exit code 3).

    Cause: the merged model or its graph does not compute what the unmerged one does, or is slower than the base.
    Cure: everything is in `OUT.failed`; its report names the check, and the first module and tensor that go wrong.
    """

    exit_code = EXIT_GATE


class UnclearError(Exception):
    """Between functions: a request to a store without an answer, which may be carried out yet. error: in words."""

    def __init__(self, error: OutputError) -> None:
        super().__init__(str(error))
        self.error = error
