"""The one exception type that is meant for the person who started the program."""


class UserError(ValueError):
    """Bad input: a wrong flag, a wrong data row, a damaged checkpoint.

    Its text is one line that says what is wrong and what to do, led by `file:line:` where a file is to blame.
    Entry points print it without a traceback and exit with status 2.
    """
