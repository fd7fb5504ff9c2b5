"""`python -m pace`: the command `pace`."""

from pace.cli import main

main()
