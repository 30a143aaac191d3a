"""specprefill demo | generate | select | eval | calibrate | show-config: one command, one file."""

from __future__ import annotations

import typer

from specprefill_kernels.commands.calibrate import calibrate
from specprefill_kernels.commands.demo import demo
from specprefill_kernels.commands.evaluate import evaluate
from specprefill_kernels.commands.generate import generate
from specprefill_kernels.commands.select import select
from specprefill_kernels.commands.show_config import show_config

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Speculative prefill: a small model marks what matters in a long prompt, the large one reads only that.",
)
for command in (demo, generate, select, calibrate, show_config):
    app.command()(command)
app.command("eval")(evaluate)
