"""What was measured, and the table that it becomes."""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table


@dataclass
class Figures:
    """What was measured: row → contestant → median; rows in the order in which they first came up."""

    unit: dict[str, str] = field(default_factory=dict)
    cells: dict[str, dict[str, float]] = field(default_factory=dict)

    def put(self, row: str, unit: str, who: str, values: list[float]) -> None:
        """Note the median of these values; what is told meanwhile on stderr shows how far they lie apart."""
        self.unit[row] = unit
        self.cells.setdefault(row, {})[who] = statistics.median(values)
        spread = f" ({min(values):.4g} – {max(values):.4g})" if len(values) > 1 else ""
        print(f"  {row}: {statistics.median(values):.4g} {unit}{spread}", file=sys.stderr, flush=True)


def show(figures: Figures, who: list[str], versions: dict[str, str], about: str) -> None:
    """The table: medians, and how holdfast compares with each of the others."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table()
    table.add_column("")
    table.add_column("unit")
    for name in who:
        table.add_column(name, justify="right")
    peers = [name for name in who if name not in ("holdfast", "floor")]
    for name in peers:
        table.add_column(f"÷ {name}", justify="right")
    for row, cells in figures.cells.items():
        own = cells.get("holdfast")
        table.add_row(
            row,
            figures.unit[row],
            *(figure(cells[name]) if name in cells else "" for name in who),
            *(ratio(own, cells.get(name)) for name in peers),
        )
    console.print(about, table, *versions.values(), sep="\n", highlight=False)


def figure(value: float) -> str:
    """Three digits, and none of them an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def ratio(own: float | None, other: float | None) -> str:
    """holdfast as a part of the other: 1/7.3 where it takes less, ×2.0 where it takes more."""
    if not own or not other or own <= 0 or other <= 0:
        return ""
    return f"1/{other / own:.1f}" if own < other else f"×{own / other:.1f}"
