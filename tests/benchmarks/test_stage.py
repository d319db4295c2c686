"""The benchmark of the nonlocal stage: its small version on the CPU, and the report made of what was measured."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.goals import goals_table
from benchmarks.stage import __main__ as benchmark
from benchmarks.stage import check, contenders, counts, measure, report
from timm_nonlocal.ops.products import ProductBackend

CPU = torch.device('cpu')
SMALL = contenders.Case(2, 8, 2, 'float32')
CEILINGS = {'copy': 1e9, 'exponential': 1e9, 'product': {'float32': 1e10, 'bfloat16': 1e10}}
pytestmark = pytest.mark.usefixtures('one_thread')


def entry(case: str, **results: Any) -> dict[str, Any]:
    return {'name': case, 'counts': counts.counts(SMALL), 'floor': counts.floor(SMALL, CEILINGS), 'results': results}


def record(device: str = 'CPU X', cuda: str | None = None, cases: Iterable[dict[str, Any]] = (),
           **more: Any) -> dict[str, Any]:
    return {'device': device, 'versions': {'torch': '2.11', 'cuda': cuda}, 'commit': 'abc', 'command': 'python -m …',
            'checks': [], 'ceilings': CEILINGS, 'cases': list(cases), 'attention': [], 'tiles': [], 'kernels': [],
            'failed': [], **more}


def row(ms: float, held: float = 1e6) -> dict[str, float]:
    return {'forward': ms / 3, 'both': ms, 'bytes': held}


def test_the_small_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(benchmark, 'cases', lambda device: [SMALL])
    right = {'what': 'all', 'error': 0.0, 'tolerance': 1.0, 'right': True}
    monkeypatch.setattr(benchmark, 'checks', lambda *_: [right])
    assert benchmark.main(['--rounds', '1', '--output', str(tmp_path)]) == 0
    (found,), = (json.loads((tmp_path / 'stage.json').read_text()).values(),)
    assert found['failed'] == [] and found['versions']['torch'] == torch.__version__
    results = found['cases'][0]['results']
    assert results.keys() == contenders.CONTENDERS.keys() - {'ours, matrix products'}
    assert all(values['forward'] > 0 and values['both'] > 0 and values['bytes'] > 0 for values in results.values())
    assert 'time on a GPU, B = 128, M = 1024, k = 5, bfloat16 (≤ 0.8 ms)' in capsys.readouterr().out


def test_a_wrong_output_shows_in_the_table_and_in_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {'what': 'stage', 'error': math.nan, 'tolerance': 1e-5, 'right': False}
    monkeypatch.setattr(benchmark, 'checks', lambda *_: [wrong])
    monkeypatch.setattr(benchmark, 'cases', lambda device: [SMALL])
    monkeypatch.setattr(benchmark, 'compare', lambda *_: {})
    assert benchmark.main(['--output', str(tmp_path)]) == 1
    assert 'WRONG: stage: nan > 1e-05' in capsys.readouterr().out


def test_the_end_of_time_and_a_failing_part_cost_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, 'checks', lambda *_: 1 / 0)
    monkeypatch.setattr(benchmark, 'cases', lambda device: [SMALL, SMALL])
    monkeypatch.setattr(benchmark, 'compare', lambda *_: {})
    benchmark.main(['--output', str(tmp_path)])
    found, = json.loads((tmp_path / 'stage.json').read_text()).values()
    assert 'accuracy: ZeroDivisionError' in found['failed'][0] and len(found['cases']) == 1
    benchmark.main(['--max-minutes', '0', '--output', str(tmp_path / 'late')])
    assert not (tmp_path / 'late').exists()


def test_a_contender_that_loses_the_device_ends_the_run_and_can_be_left_out(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Step(contenders.Step):
        def both(self) -> list[torch.Tensor]:
            if isinstance(self.module, contenders.TimmBlocks):
                raise torch.AcceleratorError('an illegal memory access was encountered\nmore')
            return super().both()

    monkeypatch.setattr(benchmark, 'Step', Step)
    monkeypatch.setattr(benchmark, 'cases', lambda device: [SMALL])
    monkeypatch.setattr(benchmark, 'checks', lambda *_: [{'what': 'all', 'error': 0, 'tolerance': 1, 'right': True}])
    command = ['--rounds', '1', '--output', str(tmp_path)]
    assert benchmark.main(command) == 2
    said = ("timm NonLocalAttn k times: an illegal memory access was encountered; run again with --without 'timm "
            "NonLocalAttn k times'")
    assert capsys.readouterr().err.endswith(f'error: {said}\n')
    found, = json.loads((tmp_path / 'stage.json').read_text()).values()
    assert found['failed'] == [f'{SMALL}: DeviceLostError: {said}']
    assert benchmark.main([*command, '--without', 'timm NonLocalAttn k times']) == 0
    found, = json.loads((tmp_path / 'stage.json').read_text()).values()
    assert 'ours' in found['cases'][0]['results'] and 'timm NonLocalAttn k times' not in found['cases'][0]['results']


def test_checks_find_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that forgets the normaliser fails, and one that gives NaN too."""
    def draw() -> list[float]:
        *operands, scale = check.draw_operands(
            torch.float32, CPU, images=1, positions=20, dim=8, inner=8, k=2, logits=5.0)
        got = check.run_backend(ProductBackend, *operands, dim=8, inner=8, scale=scale)
        expected = check.backend_written_out(*operands, dim=8, inner=8, scale=scale)
        return [check.relative(a, b) for a, b in zip(got, expected, strict=True)]

    assert max(draw()) < 1e-5
    monkeypatch.setattr(torch, 'softmax', lambda x, dim, out=None: torch.exp(x, out=out))
    assert max(draw()) > 0.1
    monkeypatch.setattr(torch, 'softmax', lambda x, dim, out=None: torch.mul(x, math.nan, out=out))
    assert not any(error <= 1e-5 for error in draw())


@pytest.mark.parametrize('name', ['ours', 'ours, recompute', 'plain path', 'merged formula, autograd', 'SDPA k times'])
def test_contenders_compute_the_same_function(name: str) -> None:
    torch.manual_seed(1)
    steps = [contenders.Step(which, SMALL, CPU) for which in ('plain path', name)]
    steps[1].module.load_state_dict(steps[0].module.state_dict())
    with torch.no_grad():
        steps[1].x.copy_(steps[0].x)
    steps[1].dz = steps[0].dz
    torch.testing.assert_close(steps[0].forward(), steps[1].forward(), rtol=1e-4, atol=1e-5)
    for a, b in zip(steps[0].both(), steps[1].both(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_memory_is_the_peak_without_what_is_returned() -> None:
    def function() -> torch.Tensor:
        a, kept = torch.empty(1_000_000), torch.empty(500_000)
        del a
        torch.empty(250_000)
        return kept

    assert measure.extra_bytes(function, CPU) == 4_000_000


def test_counts_of_the_headline() -> None:
    """28 products of width 32 over M² pairs and 11 exponentials each, for 128 images; the maps add a tenth."""
    found = counts.counts(contenders.Case(128, 32, 5, 'bfloat16'))
    pairs = 128 * 1024 ** 2
    assert found['exponentials'] == 11 * pairs and found['bytes'] == 4 * 128 * 1024 * 64 * 2
    assert 1.1 < found['flop'] / (2 * 28 * 32 * pairs) < 1.12


def test_every_case_of_the_grid_once_on_a_gpu_and_the_headline_first() -> None:
    cases = benchmark.cases(torch.device('cuda'))
    assert len(set(cases)) == len(cases) == 6 * 2 * 2 * 2
    assert str(cases[0]) == report.GPU_CASE and str(benchmark.cases(CPU)[0]) == report.LOW_CASE


def test_the_report_holds_figures_against_goals() -> None:
    cpu = entry(report.CPU_CASE, ours=row(100, 40e6), **{
        'plain path': row(250, 300e6), 'timm NonLocalAttn k times': row(400, 500e6), 'SDPA k times': {'failed': 'no'}})
    gpu = entry(report.GPU_CASE, ours={**row(1.5, 250e6), 'graph': 0.75}, **{'ours, recompute': row(1.2, 55e6)})
    longest = max(cpu['floor'].values())
    kept = {'CPU X': record(cases=[cpu]), 'GPU Y': record('GPU Y', '13.0', [gpu])}
    lines = [*report.report(kept).splitlines(), *goals_table(report.goals(kept))]
    for line in (f'| time of the plain path, {report.CPU_CASE} | ≥ 2.5 × | 2.50 × | CPU X |',
                 f'| memory of timm NonLocalAttn × 5, {report.CPU_CASE} | ≥ 3 × | 12.50 × | CPU X |',
                 f'| time on a GPU, {report.GPU_CASE} | ≤ 0.8 ms | 0.75 ms | GPU Y |',
                 f'| extra memory on a GPU, {report.GPU_CASE} | < 300 MB | 250.00 MB | GPU Y |',
                 f'| extra memory, recompute on a GPU, {report.GPU_CASE} | < 60 MB | 55.00 MB | GPU Y |',
                 f'| {report.CPU_CASE} | {longest:.1f} | 100.0 | 33.3 | 2.50 × | 4.00 × | no |',
                 f'| {report.CPU_CASE} | 40.0 | 7.50 × | 12.50 × | no |'):
        assert line in lines
    missing, = (line for line in goals_table(report.goals({'CPU X': record(cases=[cpu])})) if 'Not measured' in line)
    assert f'time on a GPU, {report.GPU_CASE} (≤ 0.8 ms)' in missing and '≥ 2.5 ×' not in missing


def test_what_only_gpus_have_is_shown() -> None:
    tiles = [{'kernel': 'apply', 'tile': [128, 64, 4, 3], 'ms': 0.2, 'default': True},
             {'kernel': 'apply', 'tile': [64, 64, 4, 3], 'ms': 0.1, 'default': False},
             {'kernel': 'apply', 'tile': [256, 64, 8, 3], 'failed': 'OutOfResources'}]
    found = record('GPU Y', '13.0', [entry(report.GPU_CASE, ours=row(1))], tiles=tiles,
                   attention=[{'backend': 'FLASH', 'forward': 0.1, 'both': 0.4}, {'backend': 'FLEX', 'failed': 'no'}],
                   kernels=[{'name': 'apply', 'us': 50.0, 'count': 4.0}])
    text = report.report({'GPU Y': found})
    for line in ('| FLASH | 0.100 | 0.400 |', '| FLEX | no | |', '| apply | (64, 64, 4, 3) | 0.100 |  |',
                 '| `apply` | 50.0 | 4 |'):
        assert line in text
    assert 'fastest tile of apply: (64, 64, 4, 3), 0.100 ms' in report.table(found)
