import pytest

from roundel.analysis.units import (
    byte_unit,
    human_bytes,
    human_rate,
    human_seconds,
    human_share,
    shortened,
    time_unit,
)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1024, "1.00 KiB"),
        (1023 * 1024 + 1023, "1.00 MiB"),
        (25769803776, "24.0 GiB"),
        (25_769_803_776 * 10, "240 GiB"),
        (5 * 1024**5, "5120 TiB"),
    ],
)
def test_bytes(count: int, text: str):
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (5e-9, "5.000 ns"),
        (1.234e-5, "12.34 µs"),
        (0.007429, "7.429 ms"),
        (0.9999999999, "1.000 s"),
        (7.371391, "7.371 s"),
        (123.456, "123.5 s"),
        (5025.3, "5025 s"),
    ],
)
def test_seconds(seconds: float, text: str):
    assert human_seconds(seconds) == text


def test_shares_and_rates():
    assert [human_share(share) for share in (0.0, 0.12345, 1.0)] == ["0.0 %", "12.3 %", "100.0 %"]
    rates = [human_rate(rate) for rate in (0.0, 0.12345, 45.67, 12345.6)]
    assert rates == ["0", "0.1235", "45.67", "12,346"]


def test_units_of_an_axis():
    assert [time_unit(ns) for ns in (0, 999_999, 2_000_000_000)] == [
        (1, "ns"),
        (1_000, "µs"),
        (1_000_000_000, "s"),
    ]
    assert [byte_unit(size) for size in (1, 1024, 24 << 30)] == [
        (1, "B"),
        (1024, "KiB"),
        (1 << 30, "GiB"),
    ]


def test_shortened():
    assert shortened("round-robin", 11) == "round-robin"
    assert shortened("round-robin", 6) == "round…"
