"""BENCHMARKS.md and the figures that it is made from."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import document


def test_benchmarks_md_is_what_the_figures_make_it() -> None:
    assert document.REPORT.read_text() == document.text()


def test_goals_come_before_figures() -> None:
    lines = document.text().splitlines()
    goals = [line for line in lines[:lines.index('## Nonlocal stage')] if line.startswith('| ')]
    assert len(goals) > 8 and all('missing' not in line for line in lines)


def test_a_newer_record_replaces_that_of_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, 'ROOT', tmp_path)
    monkeypatch.setattr(document, 'REPORT', tmp_path / 'BENCHMARKS.md')
    (tmp_path / 'benchmarks').mkdir()

    def record(seconds: float | None) -> dict[str, Any]:
        return {'versions': {'torch': '2.9'}, 'commit': 'abc', 'rows': [
            {'what': 'one block', 'goal': 0.2, 'seconds': seconds}]}

    for number, records in enumerate(({'A': record(1), 'B': record(2)}, {'B': record(3)})):
        path = tmp_path / f'{number}.json'
        path.write_text(json.dumps(records))
        document.render('spectra', [path])
    assert json.loads((tmp_path / 'benchmarks/spectra.json').read_text()) == {'A': record(1), 'B': record(3)}
    text = (tmp_path / 'BENCHMARKS.md').read_text()
    assert '| `inspect`, one block | ≤ 0.2 s | 3.000 | B |' in text and '2.000' not in text
