"""What a reader needs to know about the machine, and nothing that names it: no host, user or path."""

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

_GPU_FIELDS = (
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "power.draw",
    "temperature.gpu",
    "clocks_throttle_reasons.active",
)


def usable_cores() -> int:
    """Physical cores that this process may use: not more than its affinity and its container's quota."""
    import psutil

    limits = [psutil.cpu_count(logical=False) or 1, _affinity(), _container_quota()]
    return max(1, min(limit for limit in limits if limit))


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0


def _container_quota() -> int:
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    return max(1, int(quota) // int(period)) if quota.isdigit() and period.isdigit() else 0


def describe() -> dict[str, Any]:
    """The parts of the machine that do not change during a run."""
    import onnxruntime
    import psutil

    return {
        "cpu": _cpu_model(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or None,
        "ram_bytes": psutil.virtual_memory().total,
        "os": _operating_system(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
    }


def snapshot() -> dict[str, Any]:
    """What does change: load, and the GPU's clocks, power and throttling. Taken before and after."""
    import psutil

    return {
        "load": [round(x, 2) for x in psutil.getloadavg()],
        "available_ram_bytes": psutil.virtual_memory().available,
        "gpus": gpus(),
    }


def available_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def gpus() -> list[dict[str, str]]:
    """What nvidia-smi says of each GPU; empty without one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_gpus(done.stdout)


def parse_gpus(table: str) -> list[dict[str, str]]:
    rows = [[cell.strip() for cell in line.split(",")] for line in table.splitlines() if line.strip()]
    return [dict(zip(_GPU_FIELDS, row, strict=True)) for row in rows if len(row) == len(_GPU_FIELDS)]


def _cpu_model() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _operating_system() -> str:
    kernel = f"{platform.system()} {platform.release()} {platform.machine()}"
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {kernel}"
    except (OSError, KeyError):
        return kernel


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
