"""Numbers and names as a person reads them."""

import math

DASH = "–"
_UNITS = ("B", "kB", "MB", "GB", "TB")


def number(value: float | None, digits: int = 3) -> str:
    """To significant digits, without trailing zeros; small and large ones as 1.2e-5."""
    if value is None:
        return DASH
    if not math.isfinite(value):
        return str(value)
    if value == 0 or (isinstance(value, int) and abs(value) < 10**7):
        return f"{value:,}" if isinstance(value, int) else "0"
    if 1e-3 <= abs(value) < 1e6:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{decimals}f}"
        return text.rstrip("0").rstrip(".") if decimals else text
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def milliseconds(value: float | None) -> str:
    if value is None:
        return DASH
    return f"{value:,.3f}" if value < 10 else f"{value:,.2f}"


def ratio(value: float | None) -> str:
    return DASH if value is None else f"{value:.4f}"


def interval(low: float | None, high: float | None) -> str:
    return DASH if low is None or high is None else f"{low:.4f} … {high:.4f}"


def percent(value: float | None, decimals: int = 2) -> str:
    return DASH if value is None else f"{value:.{decimals}%}"


def size(value: int | float | None) -> str:
    if value is None:
        return DASH
    amount, unit = float(value), 0
    while amount >= 1000 and unit < len(_UNITS) - 1:
        amount, unit = amount / 1000, unit + 1
    return f"{amount:,.0f} B" if unit == 0 else f"{amount:,.2f} {_UNITS[unit]}"


def seconds(value: float | None) -> str:
    return DASH if value is None else f"{value:,.1f} s"


def count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"
