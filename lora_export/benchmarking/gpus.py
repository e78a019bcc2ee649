"""What NVIDIA's management library (NVML) says about each GPU. No driver means no GPUs, which is not an error."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from lora_export.contracts import Gpu, GpuReading

_MEGA = 10**6
# Reasons that lie with the card or its cooling; idling and limits that a user has set are not among them.
_SLOWED = {
    "HwSlowdown": "hardware slowdown",
    "HwThermalSlowdown": "too hot (hardware)",
    "HwPowerBrakeSlowdown": "power brake",
    "SwThermalSlowdown": "too hot (driver)",
    "SwPowerCap": "power limit",
}


class Gpus:
    """Handles of all GPUs, opened once: a reading takes well under a millisecond each."""

    def __init__(self) -> None:
        import pynvml

        self._nvml = pynvml
        self._handles: list[Any] = []
        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]

    def __len__(self) -> int:
        return len(self._handles)

    def describe(self) -> tuple[Gpu, ...]:
        nvml, ask = self._nvml, self._ask
        return tuple(
            Gpu(
                name=_text(ask(nvml.nvmlDeviceGetName, handle)),
                memory_bytes=getattr(ask(nvml.nvmlDeviceGetMemoryInfo, handle), "total", None),
                driver=_text(ask(nvml.nvmlSystemGetDriverVersion)),
                cuda_driver=_version(ask(nvml.nvmlSystemGetCudaDriverVersion)),
                power_limit_w=_thousandth(ask(nvml.nvmlDeviceGetPowerManagementLimit, handle)),
                mig=(ask(nvml.nvmlDeviceGetMigMode, handle) or [None])[0] == 1,
            )
            for handle in self._handles
        )

    def read(self) -> tuple[GpuReading, ...]:
        return tuple(map(self._reading, self._handles))

    def _reading(self, handle: Any) -> GpuReading:
        nvml, ask = self._nvml, self._ask
        memory = ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        return GpuReading(
            sm_mhz=ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
            memory_mhz=ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM),
            power_w=_thousandth(ask(nvml.nvmlDeviceGetPowerUsage, handle)),
            temperature_c=ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
            used_mb=memory.used // _MEGA if memory else None,
            throttled=self._reasons(ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)),
        )

    def memory(self) -> tuple[int, int] | None:
        """(used, free) bytes of the first GPU, which is the one that sessions run on; None without one."""
        if not self._handles:
            return None
        info = self._nvml.nvmlDeviceGetMemoryInfo(self._handles[0])
        return int(info.used), int(info.free)

    def _reasons(self, bits: int | None) -> tuple[str, ...]:
        known = {words: getattr(self._nvml, f"nvmlClocksThrottleReason{key}") for key, words in _SLOWED.items()}
        return tuple(words for words, bit in known.items() if (bits or 0) & bit)

    def _ask(self, question: Callable[..., Any], *about: Any) -> Any:
        """The answer, or None where the card does not give one (a virtual GPU hides its clocks)."""
        try:
            return question(*about)
        except self._nvml.NVMLError:
            return None


def _text(value: str | bytes | None) -> str | None:
    return value.decode() if isinstance(value, bytes) else value


def _thousandth(value: int | None) -> float | None:
    return None if value is None else value / 1000


def _version(number: int | None) -> str | None:
    """13000 is CUDA 13.0."""
    return None if number is None else f"{number // 1000}.{number % 1000 // 10}"
