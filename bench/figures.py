"""What was measured, and the table that it becomes: on the terminal, as Markdown and as JSON."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass
class Figures:
    """What was measured: row → contestant → values; rows in the order in which they first came up."""

    unit: dict[str, str] = field(default_factory=dict)
    cells: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def put(self, row: str, unit: str, who: str, values: list[float]) -> None:
        """Note these values; what is told meanwhile on stderr shows how far they lie apart."""
        self.unit[row] = unit
        self.cells.setdefault(row, {})[who] = values
        spread = f" ({min(values):.4g} – {max(values):.4g})" if len(values) > 1 else ""
        print(f"  {row}: {statistics.median(values):.4g} {unit}{spread}", file=sys.stderr, flush=True)

    def median(self, row: str, who: str) -> float | None:
        """The median of a cell, None for one that is empty."""
        values = self.cells[row].get(who)
        return statistics.median(values) if values else None


@dataclass(frozen=True)
class Report:
    """The figures of one session, with what a reader has to know of it. machine: facts by name (`machine.facts`)."""

    figures: Figures
    who: list[str]
    versions: dict[str, str]
    about: list[str]
    machine: dict[str, str]

    @property
    def peers(self) -> list[str]:
        return [name for name in self.who if name not in ("holdfast", "floor")]

    def heads(self) -> list[str]:
        return ["", "unit", *self.who, *(f"÷ {name}" for name in self.peers)]

    def rows(self) -> list[list[str]]:
        """Medians, and how holdfast compares with each of the others."""
        figures = self.figures
        return [
            [
                row,
                figures.unit[row],
                *(figure(figures.median(row, name)) for name in self.who),
                *(ratio(figures.median(row, "holdfast"), figures.median(row, name)) for name in self.peers),
            ]
            for row in figures.cells
        ]

    def show(self) -> None:
        """Print the table."""
        table = Table()
        for number, head in enumerate(self.heads()):
            table.add_column(head, justify="left" if number < 2 else "right")
        for row in self.rows():
            table.add_row(*row)
        console = Console(width=None if sys.stdout.isatty() else 150)
        console.print("\n".join(self.about), table, *self.versions.values(), sep="\n", highlight=False)

    def markdown(self) -> str:
        """The same as Markdown."""
        lines = [self.heads(), ["---", "---", *("---:" for _ in self.heads()[2:])], *self.rows()]
        facts = [f"- {name}: {value}" for name, value in self.machine.items()]
        told = [f"- {line}" for line in (*self.about, *self.versions.values())]
        return "\n".join(["# Bench", "", *facts, *told, "", *(f"| {' | '.join(line)} |" for line in lines), ""])

    def json(self) -> str:
        """Every value that was measured, for programs."""
        rows = {
            row: {"unit": self.figures.unit[row], "values": cells}
            | {"median": {name: statistics.median(values) for name, values in cells.items()}}
            for row, cells in self.figures.cells.items()
        }
        told = {"machine": self.machine, "about": self.about, "versions": self.versions, "rows": rows}
        return json.dumps(told, indent=2, ensure_ascii=False) + "\n"

    def write(self, folder: Path) -> list[Path]:
        """Write bench.md and bench.json into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        places = [folder / "bench.md", folder / "bench.json"]
        for place, text in zip(places, (self.markdown(), self.json()), strict=True):
            place.write_text(text)
        return places


def figure(value: float | None) -> str:
    """Three digits, and none of them an exponent."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def ratio(own: float | None, other: float | None) -> str:
    """holdfast as a part of the other: 1/7.3 where it takes less, ×2.0 where it takes more."""
    if not own or not other or own <= 0 or other <= 0:
        return ""
    return f"1/{other / own:.1f}" if own < other else f"×{own / other:.1f}"
