"""The benchmark of training steps: its small version on the CPU, and the report that is made of what was measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import train as benchmark
from benchmarks import train_report
from benchmarks.goals import goals_table

GPU = {'device': 'GPU X', 'versions': {'torch': '2.11', 'cuda': '13.0'}, 'commit': 'abc', 'ceilings': {}, 'failed': []}


def row(model: str = 'preresnet20', mode: str = 'graph bf16', seeds: int = 1, ms: float = 0.74) -> dict[str, Any]:
    return {'model': model, 'mode': mode, 'seeds': seeds, 'ms': ms, 'images_per_second': 128 * seeds / ms * 1000}


@pytest.mark.usefixtures('one_thread')
def test_the_small_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(['--output', str(tmp_path / 'found.json')]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in out[1:3]] == [['preresnet20', 'eager', 'float32', seeds] for seeds in '12']
    assert 'an epoch takes' in out[3] and len(out) == 4
    (device, record), = json.loads((tmp_path / 'found.json').read_text()).items()
    assert device.startswith('cpu') and record['versions']['torch'] == torch.__version__ and record['failed'] == []
    for found in record['steps']:
        assert found['images_per_second'] == pytest.approx(1000 * found['seeds'] * 16 / found['ms'])


def test_every_way_to_step_is_measured_once_on_a_gpu() -> None:
    cases = benchmark.cases(torch.device('cuda'))
    assert len(set(cases)) == len(cases)
    assert {(case.mode, case.seeds) for case in cases if case.model == 'preresnet20'} == {
        ('eager float32', 1), ('eager bf16', 1), ('graph bf16', 1), ('compile + graph bf16', 1), ('graph bf16', 3),
        ('graph bf16', 5), ('compile + graph bf16', 3), ('compile + graph bf16', 5)}
    assert {case.model for case in cases} == train_report.TARGETS.keys()


def test_a_case_that_fails_and_the_end_of_time_cost_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    def measure(case: Any, *arguments: object) -> dict[str, Any]:
        if case.seeds == 1:
            raise RuntimeError('no kernel')
        return row(mode=case.mode, seeds=case.seeds)

    monkeypatch.setattr(benchmark, 'measure', measure)
    monkeypatch.setattr(benchmark, 'epoch', measure)
    record = benchmark.run(tmp_path / 'found.json', 8)
    assert len(record['steps']) == 1 and len(record['failed']) == 2 and 'RuntimeError: no kernel' in record['failed'][0]
    assert benchmark.run(tmp_path / 'found.json', 0)['steps'] == []
    assert 'out of time: steps of' in capsys.readouterr().out


def test_the_report_holds_figures_against_floors_and_goals() -> None:
    steps = [row(), row(mode='compile + graph bf16', ms=0.5), row(seeds=5, ms=1.85), row('preresnet56', ms=1.8)]
    epochs = [{'model': 'preresnet20', 'wall_seconds': 0.35, 'share': 0.94}]
    stage = 'preresnet20_nl_proposed_k5'
    steps += [{**row(stage, ms=ms), 'nl_args': nl_args} for nl_args, ms in (
        (['symmetric'], 3.5), (['symmetric', 'stable'], 3.64), ([], 3.0))]
    kernels = [{'model': 'preresnet20', 'kernels_per_step': 300.0, 'busy': 0.97,
                'longest': [{'name': 'wgrad', 'us_per_step': 50.0, 'per_step': 10.0}]}]
    record = {**GPU, 'steps': steps, 'epochs': epochs, 'kernels': kernels}
    lines = goals_table(train_report.goals({'GPU X': record}))
    for line in ('| step of preresnet20 on a GPU, compile + graph bf16 | ≤ 0.84 ms | 0.500 ms | GPU X |',
                 '| step of preresnet20 on a GPU, 5 seeds, graph bf16 | ≤ 4 × one seed '
                 '| 1.850 ms, 2.50 × one seed | GPU X |',
                 f'| step of {stage} on a GPU, graph bf16 | ≤ 2.0 ms | 3.000 ms | GPU X |',
                 '| step with stable=True over one without, on a GPU | ≤ 1.05 × | 1.040 × | GPU X |',
                 '| share of an epoch that steps and test take | > 90 % | 94 % | GPU X |'):
        assert line in lines
    assert 'step of preresnet56_nl_proposed_k5 on a GPU (≤ 3.5 ms)' in lines[-1]
    table = train_report.table(record).splitlines()
    assert table[1].split()[-4:] == ['0.740', '2.00', '-', '172973']
    assert table[3].split()[-4:-1] == ['1.850', '-', '2.50']
