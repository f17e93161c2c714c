"""The error that is the user's to mend."""


class UserError(ValueError):
    """A mistake in what the user gave: says what was wrong, what was given, and what would be right.

    Commands print it as one line and end with exit code 2.
    """
