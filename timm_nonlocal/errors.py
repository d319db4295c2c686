"""What an error says, in one line."""

__all__ = ['first_line', 'last_line']


def first_line(error: Exception) -> str:
    """The first line with words in it, without a full stop; the error's class where there is none."""
    lines = (line.strip().rstrip('.') for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def last_line(error: Exception) -> str:
    """The last line with words in it, which says most where errors are chained; its class where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
