"""README.md of a package: what it is, how it was proved, and the commands that run it."""

import json

from lora_export import wording
from lora_export.escape import markdown
from lora_export.packages.job import PackageFacts, Run, Snippet

NAME = "README.md"
FOLDER = "."


def text(run: Run, facts: PackageFacts, licence: str | None) -> str:
    """For a target whose README is no model card. licence: None if nobody knows it."""
    lines = [f"# {markdown(facts.name)} for {facts.target.title}", "", *about(run, facts)]
    lines += [f"- licence: {markdown(licence)}"] * bool(licence) + ["", *how_to_run(facts)]
    return "\n".join(lines) + "\n"


def about(run: Run, facts: PackageFacts) -> list[str]:
    """What was merged into what, and what was found when it was checked."""
    names = [markdown(a.name) for a in run.manifest.adapters]
    how = (
        "beside its weights, as lora-export merged and checked it"
        if facts.adapters
        else "merged into its weights by lora-export"
    )
    words = f"the adapter{'s' * (len(names) > 1)} {' and '.join(names)}"
    lines = [f"{markdown(run.manifest.base.name)} with {words} {how}."]
    return [*lines, *(f"- {markdown(name)}: {markdown(value)}" for name, value in proof(run).items())]


def proof(run: Run) -> dict[str, str]:
    """The figures of the run's report in words."""
    merge, validation, bench = run.merge, run.validation, run.report.benchmark
    proof = {"adapter tensors merged": wording.adapter_tensors(merge)}
    if merge.delta_survival is not None:
        proof["update that survived rounding"] = wording.percent(merge.delta_survival, 4)
    proof["checks against the unmerged model"] = f"{wording.checks_passed(validation)} passed"
    difference = next((c.value for c in validation.checks if c.name == "onnx_logits_max_abs"), None)
    if difference is not None:
        proof["largest difference of an ONNX output"] = wording.number(difference, 2)
    if bench:
        proof["graph, compared with the base"] = wording.GRAPH[bench.graph_identical]
        proof["latency against the base"] = wording.latency_verdict(bench)
    return proof


def how_to_run(facts: PackageFacts) -> list[str]:
    snippet = facts.target.snippet(facts, FOLDER)
    lines = ["## Run it", "", "In this folder:", "", "```bash", snippet.setup, "```", ""]
    lines += [*_shell(snippet), ""]
    lines += _expected(facts)
    notes = facts.target.notes(facts)
    return [*lines, *([notes.rstrip(), ""] if notes else []), *_verify()]


def _shell(snippet: Snippet) -> list[str]:
    return ["```bash", f"{snippet.interpreter.command} <<'END'", snippet.code, "END", "```"]


def _expected(facts: PackageFacts) -> list[str]:
    """What the program prints where the arithmetic is that of the unmerged model. JSON, which no fence ends in."""
    if facts.sample is None:
        return []
    said = facts.sample.text if facts.sample.text is not None else list(facts.sample.numbers)
    who = "The unmerged model says" if facts.sample.text is not None else "The validated graph computes"
    return [f"{who}:", "", "```json", json.dumps(said, ensure_ascii=False), "```", ""]


def _verify() -> list[str]:
    return ["", "`lora-export verify .` checks every file, and with `--run` that the model says the same."]
