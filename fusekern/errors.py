"""Errors whose message is meant for the person at the keyboard: the command line prints it without a traceback."""

import difflib
from collections.abc import Iterable


class FusekernError(Exception):
    """Bad input: names the argument or file, what was found and what is needed.

    ``exit_code`` is what the command line returns.
    """

    exit_code = 2


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean X?`` for the nearest known word, or nothing where none is near: the end of a message."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""
