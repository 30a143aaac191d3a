"""Quality at equal kept tokens: `python -m bench.quality [options]` is `specprefill eval [options]`."""

from __future__ import annotations

import typer

from specprefill_kernels.commands.evaluate import evaluate

if __name__ == "__main__":
    typer.run(evaluate)
