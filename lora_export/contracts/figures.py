"""A number that was measured: it may be NaN or infinite, which a JSON document spells as a word."""

from typing import TYPE_CHECKING

NONFINITE = ("nan", "inf", "-inf")  # as Python spells them, and reads them with float()
NOT_IN_JSON = {"json": False}  # metadata of a dataclass field that `storage.documents.as_json` leaves out

if TYPE_CHECKING:
    Figure = float
else:

    class Figure(float):
        """The type of a dataclass field that takes a number or one of `NONFINITE`; elsewhere it is a float."""
