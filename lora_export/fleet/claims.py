"""Who works on what in a root that several drivers share, so that nothing is done twice.

A claim is a file claims/KEY.json that names its holder; it counts as long as the holder's lease
claims/drivers/HOLDER.json does. A driver of this machine is asked for by its process; of one elsewhere the lease
must change from time to time, by the clock of whoever looks. A claim saves work, no more: objects are whole and
unmixed without it, as the store creates each once.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lora_export.errors import LoraExportError
from lora_export.fleet.stores.protocol import Store
from lora_export.storage.boot import boot_id, process_numbers
from lora_export.storage.documents import as_json, decode, parse_json
from lora_export.storage.interrupts import Interrupts

T = TypeVar("T")

BEAT = 10.0  # seconds between two signs of life
PATIENCE = 60.0  # seconds without one, after which a driver elsewhere counts as dead
_SETTLED = 0.2  # seconds in which another driver that takes over the same claim has written its name, too
PLACE = "claims"


@dataclass(frozen=True)
class Lease:
    """host: the machine and its process numbers; started: when the process did, in ticks since the machine did;
    beat: counts on."""

    host: str
    pid: int
    started: int
    beat: int = 0


@dataclass(frozen=True)
class _Claim:
    holder: str


class Claims:
    """The claims of this process in a root. Errors of the store are raised, but for those of a sign of life."""

    def __init__(self, store: Store) -> None:
        self._store, self._id = store, secrets.token_hex(8)
        self._lease = Lease(_host(), os.getpid(), _started(os.getpid()))
        self._held: set[str] = set()
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Claims":
        return self

    def __exit__(self, *error: object) -> None:
        """Give all back, and take away what dead drivers have left."""
        with Interrupts():
            self._close()

    def _close(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            with contextlib.suppress(LoraExportError, OSError):
                for key in sorted(self._held):
                    self._store.remove(_claim(key))
                self._store.remove(_driver(self._id))
        with contextlib.suppress(LoraExportError, OSError):
            self.tidy()

    def take(self, key: str) -> bool:
        """Whether this process may work on a key, and nobody else does."""
        if key in self._held:
            return True
        self._live()
        name, mine = _claim(key), _encoded(_Claim(self._id))
        if not self._store.create(name, mine):
            raw = self._store.read(name)
            if raw is not None and self.alive(_holder(raw)):
                return False
            if self._store.read(name) != raw:  # somebody was faster
                return False
            self._store.replace(name, mine)
            time.sleep(_SETTLED)
            if self._store.read(name) != mine:
                return False
        self._held.add(key)
        return True

    def give_back(self, key: str) -> None:
        if key in self._held:
            self._held.discard(key)
            self._store.remove(_claim(key))

    def alive(self, holder: str) -> bool:
        """Whether a driver is, as far as can be told from here."""
        raw = self._store.read(_driver(holder)) if holder else None
        lease = _read(raw, Lease)
        if raw is None or lease is None:
            return False
        if lease.host == self._lease.host:
            return _started(lease.pid) == lease.started
        before, since = self._seen.get(holder, (b"", 0.0))
        now = time.monotonic()
        if raw != before:
            self._seen[holder] = (raw, now)
            return True
        return now - since < PATIENCE

    def tidy(self) -> None:
        """Take away leases and claims of dead drivers."""
        names = [n for n in self._store.names(PLACE) if n.endswith(".json")]
        drivers = {Path(n).stem for n in names if n.startswith(f"{PLACE}/drivers/")}
        dead = {holder for holder in drivers if holder != self._id and not self.alive(holder)}
        for name in names:
            if name.startswith(f"{PLACE}/drivers/"):
                continue
            holder = _holder(self._store.read(name) or b"")
            if holder in dead or (holder not in drivers and not self.alive(holder)):
                self._store.remove(name)
        for holder in dead:
            self._store.remove(_driver(holder))

    def _live(self) -> None:
        """The lease, from the first claim on."""
        if self._thread is None:
            self._store.replace(_driver(self._id), _encoded(self._lease))
            self._thread = threading.Thread(target=self._beat, daemon=True, name="lease")
            self._thread.start()

    def _beat(self) -> None:
        beat = 0
        while not self._ended.wait(BEAT):
            beat += 1
            lease = Lease(self._lease.host, self._lease.pid, self._lease.started, beat)
            with contextlib.suppress(LoraExportError, OSError):  # the next one may get through
                self._store.replace(_driver(self._id), _encoded(lease))


def _claim(key: str) -> str:
    return f"{PLACE}/{key}.json"


def _driver(holder: str) -> str:
    return f"{PLACE}/drivers/{holder}.json"


def _encoded(value: Lease | _Claim) -> bytes:
    return json.dumps(as_json(value)).encode()


def _holder(raw: bytes) -> str:
    claim = _read(raw, _Claim)
    return claim.holder if claim is not None and claim.holder.isalnum() else ""


def _read(raw: bytes | None, type_: type[T]) -> T | None:
    """None for what this does not understand, which counts as left by nobody."""
    if raw is None:
        return None
    try:
        return decode(parse_json(raw, len(raw)), type_, "a claim", PLACE)
    except (ValueError, LoraExportError):
        return None


def _host() -> str:
    """This machine, up to its next start, and its process numbers."""
    return f"{socket.gethostname()} {boot_id()} {process_numbers()}"


def _started(pid: int) -> int:
    """When a process started, 0 for one that is not there or is dead already."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        state, *rest = text.rpartition(")")[2].split()
        return 0 if state in "ZX" else int(rest[18])
    except (OSError, ValueError, IndexError):
        return 0
