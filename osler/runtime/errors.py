"""The one exception that means "you can fix this": the program prints it without a traceback and exits with code 2."""


class UserError(Exception):
    """A mistake in what the user gave (a key, a file, a number); the message is one paragraph that says what to do."""

    # Whether this process, one of several that train together, reports the error; None: they have not agreed on that.
    is_reporter: bool | None = None
