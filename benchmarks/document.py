"""BENCHMARKS.md: its parts, each made by a command from figures that are kept as JSON."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hub.generated import block, markers, replace_block
from timm_nonlocal.files import write_text
from train.records.runs import ROOT

__all__ = ['REPORT', 'kept', 'put', 'render', 'write_part']

REPORT = ROOT / 'BENCHMARKS.md'


def put(text: str, name: str, part: str) -> str:
    """A document with what `python -m benchmarks.<name>` made replaced, or added at the end where it is not there."""
    module = f'benchmarks.{name}'
    if markers(name, module)[0] not in text:
        return f'{text.rstrip()}\n\n{block(name, module, part)}\n'.lstrip()
    return replace_block(text, name, module, part)


def write_part(name: str, part: str) -> None:
    """Puts a part into BENCHMARKS.md."""
    text = put(REPORT.read_text() if REPORT.is_file() else '# Benchmarks\n', name, part)
    write_text(REPORT, text)


def kept(name: str) -> Path:
    """Where the figures of a part are kept, a record a device."""
    return ROOT / 'benchmarks' / f'{name}.json'


def render(name: str, files: Sequence[Path], report: Callable[[dict[str, Any]], str]) -> None:
    """Merges files into what is kept, a device's newer record for its older one, and puts the report of it."""
    records = json.loads(kept(name).read_text()) if kept(name).is_file() else {}
    for path in files:
        records |= json.loads(path.read_text())
    write_text(kept(name), json.dumps(records, indent=1) + '\n')
    write_part(name, report(records))
