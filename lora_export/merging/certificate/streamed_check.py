"""The certificate of a merge that went straight into an export, whose numbers lie in no merged folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_export.contracts import AdapterChoice, Findings
from lora_export.merging.certificate.as_recorded import adapter_files
from lora_export.merging.certificate.compare import compare
from lora_export.merging.certificate.document import Certificate, certificate_of
from lora_export.merging.certificate.recompute import elsewhere
from lora_export.merging.certificate.verify import planned_again
from lora_export.merging.planning.base_checks import base_checks
from lora_export.merging.running.stream import MergedSource, write_outline


def same_tensors(findings: Findings, recorded: Certificate, hashes: Mapping[str, str]) -> None:
    """Whether the tensors that the export says it was made of are the certificate's. hashes: by name."""
    wanted = recorded.hashes
    other = [n for n in wanted.keys() | hashes.keys() if wanted.get(n) != hashes.get(n)]
    notes = [f"{n}: the export was made of other numbers than the certificate is about" for n in sorted(other)]
    findings.judge("tensors", f"the export was made of the certificate's {len(wanted)} tensors", notes)


def merged_again(
    findings: Findings,
    recorded: Certificate,
    base: Path,
    adapters: Sequence[AdapterChoice],
    outline: Path,
) -> MergedSource | None:
    """The merge of base and adapters, computed as it is read, and `outline` for what lies beside the numbers.

    None where they do not make the certificate's model.
    """
    adapter_files(findings, recorded, adapters)
    planned = planned_again(findings, recorded, base, adapters)
    if planned is None:
        return None
    source = MergedSource(planned, outline)
    write_outline(source)
    return source


def same_certificate(findings: Findings, recorded: Certificate, source: MergedSource) -> None:
    """Whether the certificate is that of the merge, of which every tensor was hashed."""
    records = recorded.hashes
    other = [r.name for r in source.audit.records if records.get(r.name) != r.hash_out]
    away = elsewhere(recorded, source.plan)
    why = f" ({away}, whose last bits no merged folder is there to compare with)" if away else ""
    notes = [f"{name} is not what the certificate says that it is{why}" for name in other]
    findings.judge(
        "arithmetic", f"the {len(records)} tensors of the certificate are what the merge computes", notes
    )
    compare(findings, recorded, certificate_of(source.audit, base_checks(source.plan), {}))
