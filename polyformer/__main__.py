"""`python -m polyformer` is the command `polyformer`."""

from polyformer.cli import main

main()
