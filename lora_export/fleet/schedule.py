"""What a fleet has to do: rows in groups that share a base's preparation, and which of them comes next."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from lora_export.contracts.fleet import PlannedRow

AVOIDED = 5.0  # seconds that a row waits for another worker than the one that it killed


@dataclass
class Item:
    """An object to make. rows: all that have its key; attempts: how often a worker took it up; ready_at: when it
    may be taken up, by the clock of `time.monotonic`; avoid: slot that it killed; verdict: what was known of it
    when somebody else was found working on it, None where nobody was."""

    rows: list[PlannedRow]
    attempts: int = 0
    ready_at: float = 0.0
    avoid: int = -1
    verdict: bytes | None = None

    @property
    def planned(self) -> PlannedRow:
        return self.rows[0]


@dataclass
class Group:
    """Rows of one preparation, or of one base without a shared one (base_key "").

    tries: rows that the preparation was tried with; attempts: how often workers died of it; slots: that work on it.
    """

    base_key: str
    items: deque[Item]
    state: Literal["new", "preparing", "ready"]
    tries: int = 0
    attempts: int = 0
    ready_at: float = 0.0
    avoid: int = -1
    slots: set[int] = field(default_factory=set)

    def alone(self, why: str) -> None:
        """Have each row do without the preparation."""
        self.base_key, self.state = "", "ready"
        for item in self.items:
            item.rows = [replace(row, base_key="", alone=why) for row in item.rows]


def groups(planned: Iterable[PlannedRow]) -> list[Group]:
    """The rows that are to be done, largest group first; rows of one key are one item."""
    found: dict[tuple[str, str], Group] = {}
    items: dict[str, Item] = {}
    for row in planned:
        if row.state is not None:
            continue
        if row.key in items:
            items[row.key].rows.append(row)
            continue
        items[row.key] = item = Item([row])
        place = (row.base_key, "" if row.base_key else row.row.model)
        if place not in found:
            found[place] = Group(row.base_key, deque(), "new" if row.base_key else "ready")
        found[place].items.append(item)
    return sorted(found.values(), key=lambda g: -len(g.items))


def order(all_: Sequence[Group], slot: int) -> Iterator[Group]:
    """Where a slot looks for work: its own group, so that it keeps its base; then groups that nobody has begun;
    then those that have most left for each of their slots."""
    waiting = [g for g in all_ if g.items and g.state != "preparing"]
    own = [g for g in waiting if slot in g.slots]
    new = [g for g in waiting if g not in own and not g.slots]
    others = [g for g in waiting if g not in own and g.slots]
    yield from own
    yield from sorted(new, key=lambda g: -len(g.items))
    yield from sorted(others, key=lambda g: -len(g.items) / len(g.slots))


def ready(group: Group, slot: int, slots: int, now: float) -> Iterator[Item]:
    """The items that this slot may take up, in order."""
    return (item for item in list(group.items) if may(item, slot, slots, now))


def may(what: Item | Group, slot: int, slots: int, now: float) -> bool:
    """Whether its time has come. Another slot than the one that it killed has the first try, if there is one."""
    return what.ready_at <= now and (what.avoid != slot or slots == 1 or what.ready_at + AVOIDED <= now)
