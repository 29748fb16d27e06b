"""What the task scripts say in one line, and end: what was given, why not, what instead."""


class ArgumentsError(ValueError):
    """The arguments do not go together; the message says what was given, why not, and what to do instead."""


class DataError(ValueError):
    """The data asked for cannot be used; the message says what was given, why not, and what to do instead."""


class ModelError(ValueError):
    """The model asked for cannot be built; the message says what was given, why not, what instead."""


def reason(error: Exception) -> str:
    """The first line of what went wrong, as part of a sentence."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
