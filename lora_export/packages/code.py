"""Code in a package: programs of this project alone, which runtimes that run Python load.

It contains nothing of a model. `verify` writes it again and compares, so that no package has a stranger's code.
"""

from collections.abc import Mapping
from pathlib import Path

from lora_export.errors import InputError
from lora_export.packages.job import PackageFacts

SUFFIX = ".py"


def names(facts: PackageFacts) -> tuple[str, ...]:
    """Patterns of the names of all files that the package may have beyond those of any package."""
    return (*facts.target.file_names, *{Path(name).name for name in facts.target.code(facts)})


def write(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def check(folder: Path, facts: PackageFacts) -> None:
    """InputError for a file of code that this version does not write for such a package."""
    files = facts.target.code(facts)
    for path in sorted(folder.rglob(f"*{SUFFIX}")):
        name = path.relative_to(folder).as_posix()
        if name not in files or path.read_bytes() != files[name].encode():
            raise InputError(
                f"{name} is not the program that lora-export writes for {facts.target.title}",
                where=path,
                expected="the code of this version, which contains nothing of a model",
                next_step="do not run it, or verify it with the version that made it (manifest.json, tool)",
            )
