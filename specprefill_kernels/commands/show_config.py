"""specprefill show-config: what is here and what runs."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from specprefill_kernels.commands.shared import new_console


def show_config() -> None:
    """Versions, machine, models and op x backend, with the reason where something is missing."""
    from specprefill_kernels._diagnosis import config_rows

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in config_rows():
        table.add_row(name, Text(value, "red" if value.startswith("failed") else ""))
    new_console().print(table)
