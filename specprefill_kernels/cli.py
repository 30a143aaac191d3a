"""The entry point of the command `specprefill`. It imports nothing that could be missing before it can say so."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line. Where its parts are not installed it says what to install; `show-config` still prints."""
    try:
        from specprefill_kernels.commands import app
    except ImportError as error:
        if sys.argv[1:2] == ["show-config"]:
            from specprefill_kernels._diagnosis import config_rows

            for name, value in [*config_rows(), ("command line", f"failed: {error}")]:
                print(f"{name:<24}{value}")
            return
        sys.exit(f'specprefill: {error}. The command line needs: pip install "specprefill-kernels[demo]"')
    app(prog_name="specprefill")


if __name__ == "__main__":
    main()
