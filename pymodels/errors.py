"""What a user's call, file or machine can get wrong."""


class InputError(ValueError):
    """A wrong argument, file or setting: says what was got and what was expected. The command line prints it alone."""


class CheckpointError(InputError):
    """A checkpoint that cannot be read or written."""
