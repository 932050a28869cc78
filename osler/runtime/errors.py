"""The one exception that means "you can fix this": the program prints it without a traceback and exits with code 2."""


class UserError(Exception):
    """What the user can put right: a wrong key, a missing file or package, a full disk. The message says how in a paragraph."""

    exit_code = 2  # what the program ends with
    # Whether this process, one of several that train together, reports the error; None: they have not agreed on that.
    is_reporter: bool | None = None
