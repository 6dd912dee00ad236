"""`python -m streamt2v`."""

from streamt2v.cli.app import main

main()
