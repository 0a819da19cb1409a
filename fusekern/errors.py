"""Errors whose message is meant for the person at the keyboard: the command line prints it without a traceback."""


class FusekernError(Exception):
    """Bad input: names the argument or file, what was found and what is needed.

    ``exit_code`` is what the command line returns.
    """

    exit_code = 2
