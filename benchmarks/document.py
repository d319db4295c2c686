"""BENCHMARKS.md, made from the figures that the benchmarks keep as JSON: goals first, then every device's figures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import spectra_report, train_report
from benchmarks.goals import goals_table
from benchmarks.stage import report as stage_report
from timm_nonlocal.files import write_text
from train.records.runs import ROOT

__all__ = ['PARTS', 'REPORT', 'kept', 'render', 'text']

REPORT = ROOT / 'BENCHMARKS.md'
PARTS = {'stage': stage_report, 'train': train_report, 'spectra': spectra_report}


def kept(name: str) -> dict[str, Any]:
    """The figures of a part, a record a device; none where nothing was measured."""
    path = ROOT / 'benchmarks' / f'{name}.json'
    return json.loads(path.read_text()) if path.is_file() else {}


def text() -> str:
    """The whole document."""
    records = {name: kept(name) for name in PARTS}
    goals = [goal for name, part in PARTS.items() for goal in part.goals(records[name])]
    return '\n'.join([
        '# Benchmarks', '',
        'Forward + backward of k nonlocal steps (B images, M positions, 64 channels) beside other ways to compute '
        'them: × is how many times as long, or as much memory, the other takes. What was taken once, by hand, is in '
        '[docs/experiments.md](docs/experiments.md).', '',
        *goals_table(goals), '',
        '\n\n'.join(part.report(records[name]) for name, part in PARTS.items()), ''])


def render(name: str, files: Sequence[Path]) -> None:
    """Merges files into what is kept, a device's newer record for its older one, and writes BENCHMARKS.md anew."""
    records = kept(name)
    for path in files:
        records |= json.loads(path.read_text())
    write_text(ROOT / 'benchmarks' / f'{name}.json', json.dumps(records, indent=1) + '\n')
    write_text(REPORT, text())
