"""The certificate of a merge that was carried out into a folder."""

from collections.abc import Sequence
from pathlib import Path

from lora_export.contracts import BaseCheck
from lora_export.merging.certificate.document import NAME, certificate_of, describe_files, describe_shards
from lora_export.merging.running.write import Execution
from lora_export.storage.sealed import write_sealed


def write_certificate(
    stage: Path, execution: Execution, weights: Sequence[float], checks: Sequence[BaseCheck]
) -> None:
    """The certificate of a finished merge, written last: it names every other file."""
    planned = execution.plan
    shards = describe_shards(planned)
    files = dict(sorted((describe_files(stage, shards) | shards).items()))
    document = certificate_of(
        planned, weights, execution.records, execution.survival, checks, execution.unchecked, files
    )
    write_sealed(stage / NAME, document)
