"""What is read of the machine between blocks, and what of it is told; the GPU is played by a library of our own."""

import sys
import types
from typing import Any

import pytest

from lora_export.benchmarking import environment
from lora_export.benchmarking.conditions import Conditions, summarized, unsteady
from lora_export.benchmarking.gpus import Gpus
from lora_export.contracts import Gpu, GpuReading, Reading


class NVMLError(Exception):
    pass


def nvml(*, cards: int = 1, hides: tuple[str, ...] = (), throttle: int = 0) -> types.ModuleType:
    """A pynvml that knows some cards. hides: functions that raise, as they do on virtual GPUs."""
    answers: dict[str, Any] = {
        "nvmlInit": None,
        "nvmlDeviceGetCount": cards,
        "nvmlDeviceGetHandleByIndex": object(),
        "nvmlDeviceGetName": b"NVIDIA H100",
        "nvmlDeviceGetMemoryInfo": types.SimpleNamespace(total=80 * 10**9, used=3 * 10**9, free=77 * 10**9),
        "nvmlSystemGetDriverVersion": "580.95",
        "nvmlSystemGetCudaDriverVersion": 13010,
        "nvmlDeviceGetPowerManagementLimit": 700_000,
        "nvmlDeviceGetMigMode": [0, 0],
        "nvmlDeviceGetPowerUsage": 121_500,
        "nvmlDeviceGetTemperature": 41,
        "nvmlDeviceGetCurrentClocksThrottleReasons": throttle,
    }
    module: Any = types.ModuleType("pynvml")
    module.NVMLError = NVMLError
    module.NVML_CLOCK_SM, module.NVML_CLOCK_MEM, module.NVML_TEMPERATURE_GPU = 1, 2, 0
    reasons = (
        "HwSlowdown",
        "HwThermalSlowdown",
        "HwPowerBrakeSlowdown",
        "SwThermalSlowdown",
        "SwPowerCap",
        "GpuIdle",
    )
    for bit, reason in enumerate(reasons):
        setattr(module, f"nvmlClocksThrottleReason{reason}", 1 << bit)

    def answer(name: str, value: Any) -> Any:
        def asked(*about: Any) -> Any:
            if name in hides:
                raise NVMLError(name)
            return value

        return asked

    for name, value in answers.items():
        setattr(module, name, answer(name, value))
    clocks = {1: 1980, 2: 2619}
    module.nvmlDeviceGetClockInfo = lambda handle, kind: answer("nvmlDeviceGetClockInfo", clocks[kind])()
    return module


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    def plug(**kw: Any) -> Gpus:
        monkeypatch.setitem(sys.modules, "pynvml", nvml(**kw))
        return Gpus()

    return plug


def test_gpu_is_described_and_read(card: Any) -> None:
    gpus = card(throttle=0b110000)  # a power limit, and idling, which is no throttling
    assert gpus.describe() == (Gpu("NVIDIA H100", 80 * 10**9, "580.95", "13.1", power_limit_w=700.0, mig=False),)
    assert gpus.read() == (GpuReading(1980, 2619, 121.5, 41, 3000, throttled=("power limit",)),)
    assert environment.memory("cuda", gpus) == (3 * 10**9, 77 * 10**9)


def test_gpu_without_clock_access_is_read(card: Any) -> None:
    gpus = card(
        hides=("nvmlDeviceGetClockInfo", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetCurrentClocksThrottleReasons")
    )
    (reading,) = gpus.read()
    assert reading.sm_mhz is reading.power_w is None and reading.throttled == ()
    assert unsteady([Reading(1.0, 0.5, 0.0, 0.0, None, (reading,))]) == []


@pytest.mark.parametrize("kw", [{"cards": 0}, {"hides": ("nvmlInit",)}])
def test_gpu_or_driver_missing_gives_none(card: Any, kw: dict[str, Any]) -> None:
    gpus = card(**kw)
    assert len(gpus) == 0 and gpus.read() == gpus.describe() == () and gpus.memory() is None
    used, free = environment.memory("cuda", gpus)
    assert 0 < used < free * 1000


def test_readings_cover_time_since_last(monkeypatch: pytest.MonkeyPatch, card: Any) -> None:
    """Two cores for 10 s: 4 s of our own, 3 s of others, 1 s stolen."""
    import psutil

    seconds = iter([100.0, 110.0])
    machine = iter([(50.0, 5.0, 1.0), (56.0, 6.0, 2.0)])
    own = iter([(10.0, 1.0), (13.0, 2.0)])

    def cpu_times() -> Any:
        user, system, steal = next(machine)
        return types.SimpleNamespace(user=user, system=system, nice=0.0, steal=steal)

    process = types.SimpleNamespace(
        cpu_times=lambda: types.SimpleNamespace(**dict(zip(("user", "system"), next(own), strict=True)))
    )
    monkeypatch.setattr("lora_export.benchmarking.conditions.time.monotonic", lambda: next(seconds))
    monkeypatch.setattr(psutil, "cpu_times", cpu_times)
    monkeypatch.setattr(psutil, "Process", lambda: process)
    monkeypatch.setattr(psutil, "cpu_count", lambda: 2)
    reading = Conditions(card(cards=0)).read()
    assert reading.seconds == 10.0
    assert reading.steal == 5.0  # of 20 core seconds
    assert reading.others == 15.0


def reading(clock: int = 1980, throttled: tuple[str, ...] = (), **kw: float) -> Reading:
    gpu = GpuReading(sm_mhz=clock, power_w=100.0, throttled=throttled)
    return Reading(**({"seconds": 1.0, "load": 0.5, "steal": 0.0, "others": 0.0} | kw), cpu_mhz=None, gpus=(gpu,))


def test_conditions_quiet_machine_gives_no_note() -> None:
    assert unsteady([reading()] * 20) == []
    assert unsteady([reading()] * 19 + [reading(steal=50.0)]) == []  # one block in twenty
    assert unsteady([]) == []


def test_conditions_disturbance_is_reported() -> None:
    busy = [reading(steal=3.0, others=20.0)] * 4 + [reading()] * 4
    assert [text.rsplit(" in ", 1)[1] for text in unsteady(busy)] == ["50% of the blocks"] * 2
    (clock,) = unsteady([reading(clock=1980), reading(clock=1200)])
    assert clock == "the clock of GPU 0 varied between 1200 and 1980 MHz"
    (hot,) = unsteady([reading(throttled=("power limit",)), reading()])
    assert hot == "GPU 0 was throttled in 1 of 2 blocks: power limit"


def test_conditions_summary_has_min_median_max() -> None:
    readings = [reading(load=x, clock=c, throttled=t) for x, c, t in ((1.0, 5, ()), (3.0, 9, ("a",)), (2.0, 7, ()))]
    found = summarized(readings)
    assert found["load"] == (1.0, 2.0, 3.0) and found["gpu0_sm_mhz"] == (5, 7, 9)
    assert found["throttled"] == ("a",) and "cpu_mhz" not in found
