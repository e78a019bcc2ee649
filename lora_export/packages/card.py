"""README.md of a package for the hub: a model card, with what proves the merge."""

from collections.abc import Mapping
from typing import Any

from lora_export.escape import markdown, one_line
from lora_export.manifest import RecordedAdapter, RecordedSource
from lora_export.packages import readme
from lora_export.packages.job import PackageFacts, Run

UNKNOWN = "unknown"  # the hub's word
_INHERITED = ("language", "license_name", "license_link", "datasets")


def base_card(run: Run) -> Mapping[str, Any]:
    """The metadata of the base's own model card; empty where there is none, or none that can be read."""
    path = run.companions / "README.md"
    if not path.is_file():
        return {}
    from huggingface_hub import ModelCard

    try:
        data: dict[str, Any] = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # YAML's errors, and what the hub's classes make of other people's metadata
        return {}
    return data


def licence_of(run: Run, asked: str | None) -> str | None:
    """The licence that was asked for, else the base's own, as its model card has it."""
    found = asked or base_card(run).get("license")
    return one_line(found) if isinstance(found, str) else None


def text(run: Run, facts: PackageFacts, licence: str | None) -> str:
    """The whole card, by huggingface_hub's classes."""
    from huggingface_hub import ModelCard, ModelCardData

    manifest = run.manifest
    several = len(manifest.adapters) > 1
    base = base_card(run)
    data = ModelCardData(
        base_model=one_line(manifest.base.name.partition("@")[0]),
        base_model_relation="merge" if several else "finetune",
        library_name="transformers",
        license=licence or UNKNOWN,
        pipeline_tag=run.task.pipeline,
        tags=["lora", "merged", "lora-export"],
        **{
            k: base[k] for k in _INHERITED if k in base and not (k.startswith("license_") and "license" not in base)
        },
    )
    body = [
        f"# {markdown(facts.name)}",
        "",
        *readme.about(run, facts),
        "",
        "## How it was made",
        "",
        *_made(run),
        "",
        *readme.how_to_run(facts),
        "",
        "## Licence",
        "",
        _licence_words(run, licence),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(body) + "\n"))


def _made(run: Run) -> list[str]:
    options = run.manifest.recorded_options.merge
    rows = {
        "base": _named(run.manifest.base),
        **{f"adapter {i + 1}": f"{_named(a)}, weight {a.weight:g}" for i, a in enumerate(run.manifest.adapters)},
        "method": options.combine if options.combine != "none" else "W + scaling · B · A, rounded once",
        "base weights": run.merge.base_weights,
        "type": run.merge.dtype,
        "certificate": "lora_export_certificate.json: each tensor by hash, its rounding, what is left of the delta",
    }
    return [f"- {markdown(name)}: {markdown(value)}" for name, value in rows.items()]


def _named(source: RecordedSource | RecordedAdapter) -> str:
    return f"{source.name} @ {source.commit}" if source.commit else source.name


def _licence_words(run: Run, licence: str | None) -> str:
    from lora_export.packages.companions import licences

    names = ", ".join(markdown(p.name) for p in licences(run))
    terms = f"The base is under {markdown(licence)}." if licence else "The base names no licence: ask its authors."
    return f"{terms} Its files {names} lie beside this card." if names else terms
