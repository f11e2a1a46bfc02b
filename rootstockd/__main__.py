"""`python -m rootstockd` is the command `rootstockd`."""

from rootstockd.cli import main

main(prog_name="rootstockd")
