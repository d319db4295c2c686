"""What a command says that cannot do what it is asked."""


def fails(inspect, code, message, *arguments):
    """One line, with the message, and no traceback."""
    found, out, err = inspect(*arguments)
    assert (found, out) == (code, '') and len(err.splitlines()) == 1 and message in err, (found, out, err)
