"""What goes wrong between us and the Hub, in one line."""

from huggingface_hub.errors import HfHubHTTPError

CLIENT_ERRORS = (*HfHubHTTPError.__bases__, OSError, RuntimeError, ValueError)  # what the client raises
LENGTH = 400
HINTS = {
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
    said, hint = [], ''
    while error is not None and not hint:
        line = ' '.join(str(error).split()) or type(error).__name__
        if not any(line in other for other in said):
            said.append(line)
        hint = HINTS.get(status(error), '')
        error = error.__cause__
    text = ': '.join(said)
    return (text if len(text) <= LENGTH else f'{text[:LENGTH]}…') + (f' ({hint})' if hint else '')
