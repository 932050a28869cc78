"""The one exception that means "you can fix this": the program prints it without a traceback and exits with code 2."""


class UserError(Exception):
    """A mistake in what the user gave (a key, a file, a number); the message is one paragraph that says what to do."""

    # Of several processes that train together, whether this one tells it; None: they have not agreed on that.
    teller: bool | None = None
