"""Numbers with their units, as people read them. assets/page.js says the same of charts."""

from __future__ import annotations

_NONE = "–"


def count(number: float | None) -> str:
    """1,234,567; from ten millions on 12.3 M."""
    if number is None:
        return _NONE
    if abs(number) < 1e7:
        return f"{number:,.0f}"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(number) >= size:
            return f"{_short(number / size)} {unit}"
    return f"{number:,.0f}"


def rate(per_second: float) -> str:
    """12.3/s; so rare that it would be 0: per minute."""
    if per_second <= 0:
        return "0"
    return f"{_short(per_second)}/s" if per_second >= 0.1 else f"{_short(per_second * 60)}/min"


def seconds(number: float | None) -> str:
    """850 µs, 1.24 ms, 12.3 s, 4 min 10 s."""
    if number is None:
        return _NONE
    if number < 1e-6:
        return "0 s"
    if number < 1e-3:
        return f"{_short(number * 1e6)} µs"
    if number < 1:
        return f"{_short(number * 1e3)} ms"
    return f"{_short(number)} s" if number < 60 else duration(number)


def duration(number: float) -> str:
    """The two largest units: 42 s, 4 min 10 s, 3 h 5 min, 2 d 4 h."""
    whole = int(number)
    days, hours, minutes = whole // 86400, whole % 86400 // 3600, whole % 3600 // 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def size(number: float | None) -> str:
    """512 B, 12.3 MiB."""
    if number is None:
        return _NONE
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1024:
            return f"{_short(number)} {unit}" if unit != "B" else f"{number:.0f} B"
        number /= 1024
    return f"{_short(number)} TiB"


def share(number: float | None) -> str:
    """62 %."""
    return _NONE if number is None else f"{number:.0%}".replace("%", " %")


def norm(number: float | None) -> str:
    """0.32, 1.2e-7."""
    if number is None:
        return _NONE
    if number == 0 or 1e-3 <= number < 1e4:
        return f"{number:.2g}" if number < 100 else f"{number:,.0f}"
    digits, _, exponent = f"{number:.1e}".partition("e")
    return f"{float(digits):g}e{int(exponent)}"


def _short(number: float) -> str:
    """Three digits that count: 1.24, 12.4, 124, 1,240."""
    magnitude = abs(number)
    return f"{number:,.0f}" if magnitude >= 99.95 else f"{number:.1f}" if magnitude >= 9.995 else f"{number:.2f}"
