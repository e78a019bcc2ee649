"""What the machine was doing while a block was measured: read between blocks, never within one."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from lora_export.benchmarking.gpus import Gpus

Reading = Mapping[str, Any]

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

    def read(self) -> dict[str, Any]:
        """load: of the last minute; steal, others: percent of the time of all cores that the host took, or that
        other processes were busy; cpu_mhz: the mean clock, None where the machine hides it; gpus: a reading of
        each.
        """
        now = self._counters()
        passed = {key: now[key] - self._before[key] for key in now}
        self._before = now
        total = max(passed["seconds"] * (self._psutil.cpu_count() or 1), 1e-9)
        frequency = self._psutil.cpu_freq()
        return {
            "seconds": round(passed["seconds"], 3),
            "load": round(self._psutil.getloadavg()[0], 2),
            "steal": round(100 * passed["steal"] / total, 1),
            "others": round(max(0.0, 100 * (passed["busy"] - passed["own"]) / total), 1),
            "cpu_mhz": round(frequency.current) if frequency and frequency.current else None,
            "gpus": self._gpus.read(),
        }

    def _counters(self) -> dict[str, float]:
        times, own = self._psutil.cpu_times(), self._process.cpu_times()
        busy = times.user + times.system + getattr(times, "nice", 0.0)
        steal = getattr(times, "steal", 0.0)
        return {"seconds": time.monotonic(), "busy": busy, "steal": steal, "own": own.user + own.system}


def summarized(readings: Sequence[Reading]) -> dict[str, Any]:
    """Least, median and largest of each figure over all blocks, as three numbers; why a GPU was throttled."""
    flat = [_flat(r) for r in readings]
    found: dict[str, Any] = {}
    for key in dict.fromkeys(k for r in flat for k in r):
        values = sorted(r[key] for r in flat if isinstance(r.get(key), (int, float)))
        if values:
            found[key] = [values[0], values[len(values) // 2], values[-1]]
    reasons = sorted({reason for r in readings for gpu in r["gpus"] for reason in gpu["throttled"]})
    return found | ({"throttled": reasons} if reasons else {})


def unsteady(readings: Sequence[Reading]) -> list[str]:
    """What happened to the machine that a reader of the figures should know; empty on a quiet one."""
    if not readings:
        return []
    found = []
    for key, limit, words in (
        ("steal", _STOLEN, "the host took more than {:.0f} % of the cores' time"),
        ("others", _OTHERS, "other processes took more than {:.0f} % of the cores' time"),
    ):
        share = sum(not r[key] <= limit for r in readings) / len(readings)
        if share > _UNSTEADY:
            found.append(f"{words.format(limit)} in {share:.0%} of the blocks")
    for i in range(len(readings[0]["gpus"])):
        clocks = [r["gpus"][i]["sm_mhz"] for r in readings if r["gpus"][i]["sm_mhz"]]
        if clocks and not max(clocks) <= (1 + _CLOCKS) * min(clocks):
            found.append(f"the clock of GPU {i} went from {min(clocks)} to {max(clocks)} MHz between blocks")
        throttled = [r for r in readings if r["gpus"][i]["throttled"]]
        if throttled:
            reasons = ", ".join(sorted({x for r in throttled for x in r["gpus"][i]["throttled"]}))
            found.append(f"GPU {i} was throttled in {len(throttled)} of {len(readings)} blocks: {reasons}")
    return found


def _flat(reading: Reading) -> dict[str, Any]:
    plain = {k: v for k, v in reading.items() if k not in ("gpus", "seconds")}
    for i, gpu in enumerate(reading["gpus"]):
        plain |= {f"gpu{i}_{key}": value for key, value in gpu.items() if key != "throttled"}
    return plain
