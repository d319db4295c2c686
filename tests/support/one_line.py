"""What a command says that cannot do what it is asked."""

from collections.abc import Callable

Command = Callable[..., tuple[object, str, str]]  # gives its exit code, and what it printed on stdout and stderr


def fails(inspect: Command, code: int, message: str, *arguments: object) -> None:
    """One line, with the message, and no traceback."""
    found, out, err = inspect(*arguments)
    assert (found, out) == (code, '') and len(err.splitlines()) == 1 and message in err, (found, out, err)
