"""What the machine was doing while a block was measured: read between blocks, never within one."""

import time
from collections.abc import Sequence

from lora_export.benchmarking.gpus import Gpus
from lora_export.contracts import Reading

_STOLEN = 2.0  # percent of the time of all cores
_OTHERS = 10.0
_CLOCKS = 0.05
_UNSTEADY = 0.1  # of all blocks, before it is worth a note


class Conditions:
    """Readings since the one before: the first covers the time since this was made."""

    def __init__(self, gpus: Gpus) -> None:
        import psutil

        self._gpus, self._psutil, self._process = gpus, psutil, psutil.Process()
        self._before = self._counters()

    def read(self) -> Reading:
        now = self._counters()
        passed = {key: now[key] - self._before[key] for key in now}
        self._before = now
        total = max(passed["seconds"] * (self._psutil.cpu_count() or 1), 1e-9)
        frequency = self._psutil.cpu_freq()
        return Reading(
            seconds=round(passed["seconds"], 3),
            load=round(self._psutil.getloadavg()[0], 2),
            steal=round(100 * passed["steal"] / total, 1),
            others=round(max(0.0, 100 * (passed["busy"] - passed["own"]) / total), 1),
            cpu_mhz=round(frequency.current) if frequency and frequency.current else None,
            gpus=self._gpus.read(),
        )

    def _counters(self) -> dict[str, float]:
        times, own = self._psutil.cpu_times(), self._process.cpu_times()
        busy = times.user + times.system + getattr(times, "nice", 0.0)
        steal = getattr(times, "steal", 0.0)
        return {"seconds": time.monotonic(), "busy": busy, "steal": steal, "own": own.user + own.system}


def summarized(readings: Sequence[Reading]) -> dict[str, tuple[float | str, ...]]:
    """Least, median and largest of each figure over all blocks, as three numbers; why a GPU was throttled."""
    columns: dict[str, list[float]] = {}
    for reading in readings:
        for key, value in _figures(reading).items():
            columns.setdefault(key, []).append(value)
    summary: dict[str, tuple[float | str, ...]] = {}
    for key, values in columns.items():
        values.sort()
        summary[key] = (values[0], values[len(values) // 2], values[-1])
    reasons = sorted({reason for r in readings for gpu in r.gpus for reason in gpu.throttled})
    return summary | ({"throttled": tuple(reasons)} if reasons else {})


def _figures(reading: Reading) -> dict[str, float]:
    """Everything in a reading that is a number: load, …, gpu0_sm_mhz, …"""
    figures = vars(reading) | {f"gpu{i}_{k}": v for i, gpu in enumerate(reading.gpus) for k, v in vars(gpu).items()}
    return {k: v for k, v in figures.items() if k != "seconds" and isinstance(v, (int, float))}


def unsteady(readings: Sequence[Reading]) -> list[str]:
    """What happened to the machine that a reader of the figures should know; empty on a quiet one."""
    if not readings:
        return []
    notes = []
    for values, limit, text in (
        ([r.steal for r in readings], _STOLEN, "the host took more than {:.0f} % of the CPU time"),
        ([r.others for r in readings], _OTHERS, "other processes used more than {:.0f} % of the CPU time"),
    ):
        share = sum(not value <= limit for value in values) / len(values)
        if share > _UNSTEADY:
            notes.append(f"{text.format(limit)} in {share:.0%} of the blocks")
    for i, card in enumerate(zip(*(r.gpus for r in readings), strict=True)):
        clocks = [gpu.sm_mhz for gpu in card if gpu.sm_mhz]
        if clocks and not max(clocks) <= (1 + _CLOCKS) * min(clocks):
            notes.append(f"the clock of GPU {i} varied between {min(clocks)} and {max(clocks)} MHz")
        throttled = [gpu.throttled for gpu in card if gpu.throttled]
        if throttled:
            reasons = ", ".join(sorted({reason for one in throttled for reason in one}))
            notes.append(f"GPU {i} was throttled in {len(throttled)} of {len(readings)} blocks: {reasons}")
    return notes
