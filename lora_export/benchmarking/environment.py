"""The machine that a benchmark runs on."""

import os
import platform
from pathlib import Path

from lora_export.benchmarking.gpus import Gpus
from lora_export.contracts import Machine


def usable_cores() -> int:
    """Physical cores that this process may use: not more than its affinity and its container's quota."""
    import psutil

    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return min(limit for limit in (psutil.cpu_count(logical=False) or 1, affinity, _container_quota()) if limit)


def _container_quota() -> int:
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    return max(1, int(quota) // int(period)) if quota.isdigit() and period.isdigit() else 0


def describe() -> Machine:
    import onnxruntime
    import psutil

    return Machine(
        cpu=_cpu_model(),
        physical_cores=psutil.cpu_count(logical=False),
        logical_cores=psutil.cpu_count(),
        governor=_read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or None,
        ram_bytes=psutil.virtual_memory().total,
        os=_operating_system(),
        python=platform.python_version(),
        onnxruntime=onnxruntime.__version__,
        cuda=_cuda_libraries(),
        gpus=Gpus().describe(),
    )


def memory(provider: str, gpus: Gpus) -> tuple[int, int]:
    """(used, free) bytes where a session of this provider keeps its weights: by this process in RAM, or on the GPU.

    On a GPU it is the memory that all processes use: a container does not see its own process there.
    """
    import psutil

    on_gpu = gpus.memory() if provider != "cpu" else None
    return on_gpu or (psutil.Process().memory_info().rss, psutil.virtual_memory().available)


def _cuda_libraries() -> dict[str, str]:
    """CUDA and cuDNN as pip has installed them, and the CUDA that onnxruntime was built for."""
    from importlib.metadata import distributions

    from onnxruntime.capi import build_and_package_info

    versions = {"onnxruntime_cuda": str(getattr(build_and_package_info, "cuda_version", "none"))}
    for package in distributions():
        name = (package.metadata["Name"] or "").lower()
        if name.startswith(("nvidia-cudnn", "nvidia-cublas", "nvidia-cuda-runtime", "nvidia-cufft", "tensorrt")):
            versions[name] = package.version
    return versions


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
