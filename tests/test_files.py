"""Files that are never half there, and errors in one line."""

import os
from pathlib import Path
from threading import Thread

import pytest

from timm_nonlocal import files
from timm_nonlocal.errors import first_line, last_line


def test_a_link_stays_one_and_its_file_is_written(tmp_path: Path) -> None:
    (tmp_path / 'run').mkdir()
    (tmp_path / 'link').symlink_to('run/out')
    for text in ('first', 'second'):  # the file is made, then replaced
        files.write_text(tmp_path / 'link', text)
        assert (tmp_path / 'link').is_symlink() and (tmp_path / 'run' / 'out').read_text() == text


def test_a_pipe_is_written_and_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / 'pipe')
    got: list[str] = []
    reader = Thread(target=lambda: got.append(pipe.read_text()), daemon=True)
    reader.start()
    files.write_text(pipe, 'text')
    reader.join(10)
    assert got == ['text'] and pipe.is_fifo()


@pytest.mark.parametrize(('error', 'line', 'last'), [
    (ValueError('\n  what is wrong.\nmore \n'), 'what is wrong', 'more'), (ValueError(), 'ValueError', 'ValueError'),
    (OSError(' \n'), 'OSError', 'OSError')])
def test_first_and_last_line(error: Exception, line: str, last: str) -> None:
    assert (first_line(error), last_line(error)) == (line, last)
