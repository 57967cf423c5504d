"""Bytes, seconds and shares as people read them. The only place that formats them."""

_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_TIME_UNITS = ((1, "ns"), (1_000, "µs"), (1_000_000, "ms"), (1_000_000_000, "s"))
_NS_PER_S = 1_000_000_000


def human_bytes(count: int) -> str:
    """Bytes in powers of 1024, three digits or so: `0 B`, `999 B`, `1.50 KiB`, `23.9 GiB`."""
    size, unit = float(count), 0
    while abs(size) >= 1023.5 and unit < len(_BYTE_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.0f} B" if unit == 0 else f"{_digits(size, 3)} {_BYTE_UNITS[unit]}"


def human_seconds(seconds: float) -> str:
    """A time, four digits: `0 s`, `12.34 µs`, `7.429 ms`, `1.234 s`, `5025 s`."""
    if seconds == 0:
        return "0 s"
    factor, unit = time_unit(round(seconds * _NS_PER_S))
    return f"{_digits(seconds * _NS_PER_S / factor, 4)} {unit}"


def human_share(share: float) -> str:
    """A share from 0 to 1 in percent: `0.0 %`, `12.3 %`, `100.0 %`."""
    return f"{100 * share:.1f} %"


def human_rate(per_second: float) -> str:
    """A rate without its unit: `0`, `0.1234`, `45.6`, `12,345`."""
    return f"{per_second:,.0f}" if abs(per_second) >= 1000 else f"{per_second:.4g}"


def shortened(text: str, most: int) -> str:
    """`text`, cut to at most so many characters, an ellipsis marking the cut."""
    return text if len(text) <= most else text[: most - 1] + "…"


def time_unit(extent_ns: int) -> tuple[int, str]:
    """The unit in which times up to `extent_ns` read best, and its length in nanoseconds."""
    fitting = [unit for unit in _TIME_UNITS if abs(extent_ns) >= unit[0]]
    return fitting[-1] if fitting else _TIME_UNITS[0]


def byte_unit(extent: int) -> tuple[int, str]:
    """The unit in which sizes up to `extent` bytes read best, and its size in bytes."""
    unit = 0
    while abs(extent) >= 1024 ** (unit + 1) and unit < len(_BYTE_UNITS) - 1:
        unit += 1
    return int(1024**unit), _BYTE_UNITS[unit]


def _digits(value: float, digits: int) -> str:
    whole = len(str(int(abs(value))))
    return f"{value:.{max(digits - whole, 0)}f}"


def counted(count: int, one: str) -> str:
    """So many of something: `1 step`, `3 steps`, `2 microbatches`."""
    many = "" if count == 1 else "es" if one.endswith("ch") else "s"
    return f"{count} {one}{many}"
