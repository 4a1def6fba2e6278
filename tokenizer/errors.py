"""The one exception that means: the user's input is at fault, and here is the remedy."""

from __future__ import annotations


class UserError(Exception):
    """Bad input, told in one line: the thing, its value, the constraint, the remedy.

    The command line prints the message without a traceback and exits with status 2.
    """
