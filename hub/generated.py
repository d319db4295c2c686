"""Text that a command makes, between two markers of a document that is otherwise written by hand."""

from .results import PublishError

__all__ = ['block', 'markers', 'replace_block', 'waiting']


def markers(name: str, module: str) -> tuple[str, str]:
    """The lines before and after what `python -m MODULE` makes under a name."""
    return f'<!-- begin {name}: made by python -m {module} -->', f'<!-- end {name} -->'


def block(name: str, module: str, content: str) -> str:
    """The content between its markers."""
    begin, end = markers(name, module)
    return f'{begin}\n\n{content.strip()}\n\n{end}'


def replace_block(text: str, name: str, module: str, content: str) -> str:
    """A document with the block of a name made anew. Raises PublishError if its markers are not there once each."""
    begin, end = markers(name, module)
    if (text.count(begin), text.count(end)) != (1, 1) or text.index(begin) > text.index(end):
        raise PublishError(f'the lines {begin} and {end} must both be there, once each and in this order')
    return f'{text[:text.index(begin)]}{block(name, module, content)}{text[text.index(end) + len(end):]}'


def waiting(count: int, total: int, what: str) -> str:
    """How many of the lines of a table have no run yet."""
    return f'{count} of {total} {what} wait{"s" * (count == 1)} for runs.'
