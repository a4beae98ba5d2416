"""The command line `emd-fast`."""

from emd_fast.cli.commands import main

__all__ = ["main"]
