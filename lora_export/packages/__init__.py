"""Packages for production runtimes: one file a target; what all of them hold lies beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.packages import bom, card, companions, contents, readme, signature
from lora_export.packages.job import PackageFacts, PackageJob, PackageTarget
from lora_export.storage import sealed

__all__ = ["describe", "lay", "seal"]


def lay(job: PackageJob, target: PackageTarget) -> None:
    """Fill the stage of `job` with what the runtime reads, and with the licences."""
    target.lay(job)
    companions.lay_licences(job.run, job.stage)


def describe(job: PackageJob, target: PackageTarget, licence: str | None) -> PackageFacts:
    """Write README.md beside what was laid; what running the package takes. licence: None if nobody knows it."""
    facts = PackageFacts(
        target=target,
        name=job.name,
        task=job.run.task,
        precision=_precision(job),
        variants=tuple(job.exports),
        providers=job.providers,
        sample=job.sample,
        config=job.run.config,
        adapters=job.adapters,
    )
    write = card.text if target.for_hub else readme.text
    (job.stage / readme.NAME).write_text(write(job.run, facts, licence), encoding="utf-8")
    return facts


def seal(
    job: PackageJob,
    facts: PackageFacts,
    licence: str | None,
    options: Mapping[str, Any],
    measured: Mapping[str, Any],
    key: Path | None,
) -> None:
    """Write the bill of materials and the manifest, which names every other file.

    With a private key also the signature, which covers them all.
    """
    hashes = sealed.hash_folder(job.stage)
    bom.write(job.stage, job.run, facts, licence, hashes)
    hashes[bom.NAME] = sealed.hashed(job.stage / bom.NAME)
    contents.write(job.stage, job.run, facts, options, measured, hashes)
    if key is not None:
        signature.sign(job.stage, key)


def _precision(job: PackageJob) -> str:
    """Of what the program in the README runs: the first variant, or the merged folder."""
    first = next(iter(job.exports.values()), None)
    return first.precision if first else job.run.merge.dtype
