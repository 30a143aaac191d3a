"""`python -m specprefill_kernels` is the command `specprefill`."""

from specprefill_kernels.cli import main

main()
