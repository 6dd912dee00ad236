"""`python -m streamt2v`."""

from streamt2v.cli import main

main()
