"""``python -m fedgestalt``."""

from fedgestalt.cli import main

main()
