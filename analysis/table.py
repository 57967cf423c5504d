"""The comparison of policies for the terminal."""

from collections.abc import Mapping
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .metrics import Metrics, winner
from .units import human_bytes, human_rate, human_seconds, human_share


class ComparisonRow(NamedTuple):
    """One policy's figures as people read them; `wins` marks the fastest that fits."""

    policy: str
    step: str
    tokens_per_s: str
    bubble: str
    fill: str
    switch: str
    steady: str
    drain: str
    exposed: str
    gpu_peak: str
    host_peak: str
    fits: str
    wins: bool


# With the policies of the house the table is 111 characters wide, without the parts 80.
_HEADERS = {
    "policy": "policy",
    "step": "step",
    "tokens_per_s": "tokens/s",
    "bubble": "bubble",
    "fill": "fill",
    "switch": "switch",
    "steady": "steady",
    "drain": "drain",
    "exposed": "exposed\ntransfer",
    "gpu_peak": "GPU\npeak",
    "host_peak": "host\npeak",
    "fits": "fits",
}
_WIDTHS = {"host_peak": 80, "exposed": 72, "tokens_per_s": 62, "gpu_peak": 52, "bubble": 44}
_PARTS = ("fill", "switch", "steady", "drain")
_WIDTH_WITH_PARTS = 111


def comparison_rows(metrics: Mapping[str, Metrics]) -> list[ComparisonRow]:
    """A row a policy, in the order given."""
    best = winner(metrics)
    return [_row(policy, figures, policy == best) for policy, figures in metrics.items()]


def comparison_table(
    metrics: Mapping[str, Metrics], title: str | None = None, width: int | None = None
) -> Table:
    """The rows as a table for rich's console: the winner in bold with a star, misfits in red.

    `width` is the console's; below 111 characters the bubble's parts are left out, below 80 more.
    """
    fields = [field for field in _HEADERS if width is None or width >= _least_width(field)]
    table = Table(
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    table.add_column(_HEADERS["policy"], overflow="fold", min_width=12)
    for field in fields[1:]:
        table.add_column(_HEADERS[field], justify="right", no_wrap=True)
    for row in comparison_rows(metrics):
        named = row._replace(policy=f"{row.policy}★" if row.wins else row.policy)
        style = "bold green" if row.wins else "" if row.fits == "yes" else "red"
        table.add_row(*(getattr(named, field) for field in fields), style=style)
    return table


def _least_width(field: str) -> int:
    """From which width of the console on a column is shown."""
    if field in _PARTS:
        return _WIDTH_WITH_PARTS
    return _WIDTHS.get(field, 0)


def _row(policy: str, figures: Metrics, wins: bool) -> ComparisonRow:
    bubble = figures.bubble
    return ComparisonRow(
        policy=policy,
        step=human_seconds(figures.step_s),
        tokens_per_s=human_rate(figures.tokens_per_s),
        bubble=human_share(figures.bubble_ratio),
        fill=human_share(bubble.fill),
        switch=human_share(bubble.switch),
        steady=human_share(bubble.steady),
        drain=human_share(bubble.drain),
        exposed=human_seconds(figures.exposed_transfer_s / figures.steps),
        gpu_peak=human_bytes(max(figures.peak_memory_bytes)),
        host_peak=human_bytes(figures.peak_host_memory_bytes),
        fits="yes" if figures.fits else "no",
        wins=wins,
    )
