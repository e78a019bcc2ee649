"""The Python API: each function does what the command of its name does, with the same defaults.

Nothing is printed and no process is ended: a result comes back, or a `LoraExportError` is raised, which the command
line reports. Progress goes to `progress`.
"""

from lora_export.api.fleets import fleet, plan_fleet
from lora_export.api.stages import benchmark, export, merge, merge_and_export, package, plan, validate
from lora_export.api.tools import combine, env, extract, inspect, report, switch, truncate, understand, verify

__all__ = [
    "benchmark", "combine", "env", "export", "extract", "fleet", "inspect", "merge", "merge_and_export", "package",
    "plan", "plan_fleet", "report", "switch", "truncate", "understand", "validate", "verify",
]  # fmt: skip
