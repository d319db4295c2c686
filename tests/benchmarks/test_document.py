"""BENCHMARKS.md and its parts."""

import json

import pytest

from benchmarks import document, train_report
from benchmarks.document import put
from benchmarks.stage import report


def test_a_document_keeps_what_is_around_a_part():
    once = put('# Benchmarks\n\n## Other\n\ntext\n', 'x', 'ours')
    assert once.startswith('# Benchmarks\n\n## Other\n\ntext\n') and once.count('ours') == 1
    twice = put(once + '\n## Later\n', 'x', 'new')
    assert 'ours' not in twice and twice.endswith('\n## Later\n') and put(twice, 'x', 'new') == twice
    both = put(twice, 'y', 'other')
    assert both.startswith(twice) and put(both, 'x', 'ours').count('other') == 1


@pytest.mark.parametrize(('name', 'report'), [('stage', report.report), ('train', train_report.report)])
def test_benchmarks_md_is_what_the_figures_make_it(name, report):
    kept = json.loads(document.kept(name).read_text())
    assert put(text := document.REPORT.read_text(), name, report(kept)) == text


def test_a_newer_record_replaces_that_of_its_device(tmp_path, monkeypatch):
    monkeypatch.setattr(document, 'ROOT', tmp_path)
    monkeypatch.setattr(document, 'REPORT', tmp_path / 'BENCHMARKS.md')
    (tmp_path / 'benchmarks').mkdir()
    for number, records in enumerate(({'A': 1, 'B': 2}, {'B': 3})):
        path = tmp_path / f'{number}.json'
        path.write_text(json.dumps(records))
        document.render('stage', [path], str)
    assert json.loads((tmp_path / 'benchmarks/stage.json').read_text()) == {'A': 1, 'B': 3}
    assert "{'A': 1, 'B': 3}" in (tmp_path / 'BENCHMARKS.md').read_text()
