"""bom.cdx.json: a CycloneDX bill of materials of the model, its base and adapters, and the files of the package."""

import json
import uuid
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.escape import one_line
from lora_export.manifest import RecordedAdapter, RecordedSource
from lora_export.packages.job import PackageFacts, Run
from lora_export.storage import sealed
from lora_export.storage.documents import as_json
from lora_export.storage.sealed import FileHash
from lora_export.version import __version__

if TYPE_CHECKING:
    from cyclonedx.model.component import Component

NAME = "bom.cdx.json"
_SPACE = uuid.UUID("6f1c0a55-4f0e-5a83-9a3b-2f1f5f0f9d10")  # of serial numbers: the same files have the same one
_PREFIX = "lora-export:"


def write(stage: Path, run: Run, facts: PackageFacts, licence: str | None, hashes: Mapping[str, FileHash]) -> None:
    """Of everything in `stage`, whose hashes are given. It does not say when or where it was written."""
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output import make_outputter
    from cyclonedx.schema import OutputFormat, SchemaVersion

    model = _model(run, facts, licence)
    tool = Component(name="lora-export", version=__version__, type=ComponentType.APPLICATION, bom_ref="tool")
    bom = Bom(
        components=[_file(name, value.sha256) for name, value in hashes.items()],
        serial_number=uuid.uuid5(_SPACE, json.dumps(as_json(hashes), sort_keys=True)),
        metadata=BomMetaData(component=model, timestamp=datetime.fromisoformat(run.report.created)),
    )
    bom.metadata.tools.components.add(tool)
    bom.register_dependency(model, bom.components)
    text = make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string()
    document = json.loads(text)
    # The format has model cards; the library has no class for them.
    document["metadata"]["component"]["modelCard"] = _card(run)
    sealed.write_json(stage / NAME, document)


def _model(run: Run, facts: PackageFacts, licence: str | None) -> "Component":
    from cyclonedx.model.component import Component, ComponentType, Pedigree
    from cyclonedx.model.license import DisjunctiveLicense

    manifest = run.manifest
    ancestors = [_ancestor("base", manifest.base)]
    ancestors += [_ancestor(f"adapter-{i}", a) for i, a in enumerate(manifest.adapters)]
    return Component(
        name=one_line(facts.name),
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="model",
        description=one_line(f"{run.report.title}, packaged for {facts.target.name}"),
        licenses=[DisjunctiveLicense(name=one_line(licence))] if licence else [],
        pedigree=Pedigree(ancestors=ancestors, notes="The adapters were merged into the weights of the base."),
        properties=_properties({f"version:{k}": v for k, v in manifest.versions.items()}),
    )


def _ancestor(reference: str, source: RecordedSource | RecordedAdapter) -> "Component":
    from cyclonedx.model.component import Component, ComponentType

    return Component(
        name=one_line(source.name),
        version=source.commit,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=reference,
        properties=_properties({f"sha256:{n}": f.sha256 for n, f in source.files.items()}),
    )


def _properties(values: Mapping[str, str]) -> list[Any]:
    from cyclonedx.model import Property

    return [Property(name=one_line(f"{_PREFIX}{k}"), value=one_line(v)) for k, v in values.items()]


def _file(name: str, digest: str) -> "Component":
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.component import Component, ComponentType

    return Component(
        name=name,
        type=ComponentType.FILE,
        bom_ref=f"file:{name}",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest)],
    )


def _card(run: Run) -> dict[str, Any]:
    measured = [{"type": c.name, "value": str(c.value)} for c in run.validation.checks]
    return {
        "modelParameters": {
            "task": run.task.name,
            "architectureFamily": one_line(run.config.get("model_type", "")),
            "modelArchitecture": run.architecture,
        },
        "quantitativeAnalysis": {"performanceMetrics": measured},
    }
