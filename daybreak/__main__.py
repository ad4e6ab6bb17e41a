"""`python -m daybreak` is `daybreak`."""

from daybreak.cli import main

main()
