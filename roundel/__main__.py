"""`python -m roundel` is the command line."""

from .cli import main

main()
