"""Warnings that name the line of the program that called duoserve."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

PACKAGE = f"{Path(__file__).parent}{os.sep}"


def warn_caller(text: str) -> None:
    """Warns at the line that called the package: the first outside of it, up from who calls this.

    From Python 3.12 on ``skip_file_prefixes`` would do the same.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)
