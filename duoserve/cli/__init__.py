"""The ``duoserve`` command."""

from duoserve.cli.app import main

__all__ = ["main"]
