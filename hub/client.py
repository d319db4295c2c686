"""What goes wrong between us and the Hub, in one line."""

from huggingface_hub.errors import HfHubHTTPError

from .results import PublishError

__all__ = ['ERRORS', 'explain', 'status']

ERRORS: tuple[type[Exception], ...] = (
    PublishError, *HfHubHTTPError.__bases__, OSError, RuntimeError, ValueError)  # ours, and what the client raises
LENGTH = 400
HINTS: dict[int | None, str] = {
    401: 'log in with `hf auth login`, or set HF_TOKEN',
    403: 'the token may not write there',
    412: 'someone else committed meanwhile',
    429: 'too many requests: wait a little',
}


def status(error: BaseException) -> int | None:
    """The HTTP status behind an error of the client, if it is one."""
    return getattr(getattr(error, 'response', None), 'status_code', None)


def explain(error: BaseException) -> str:
    """One line of what the client and the server said, with what would help."""
    said: list[str] = []
    hint = ''
    cause: BaseException | None = error
    while cause is not None and not hint:
        line = ' '.join(str(cause).split()) or type(cause).__name__
        if not any(line in other for other in said):
            said.append(line)
        hint = HINTS.get(status(cause), '')
        cause = cause.__cause__
    text = ': '.join(said)
    return (text if len(text) <= LENGTH else f'{text[:LENGTH]}…') + (f' ({hint})' if hint else '')
