"""`python -m samestep.launcher` is the `samestep` command."""

from samestep.launcher.cli import main

main()
