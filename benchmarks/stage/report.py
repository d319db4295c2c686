"""How the figures are shown: a table on the terminal, and a part of BENCHMARKS.md."""

from collections.abc import Callable
from typing import Any

from benchmarks.goals import Goal, goals_table, provenance

__all__ = ['CPU_CASE', 'GPU_CASE', 'LOW_CASE', 'goals', 'report', 'table']

COMMAND = 'python -m benchmarks.stage --max-minutes 8 --output DIR'
GPU_CASE, CPU_CASE = 'B = 128, M = 1024, k = 5, bfloat16', 'B = 16, M = 1024, k = 5, float32'
LOW_CASE, BLOCK_CASE = CPU_CASE.replace('float32', 'bfloat16'), 'B = 16, M = 1024, k = 1, bfloat16'


def best(row: dict[str, Any]) -> float | None:
    """Milliseconds of forward + backward: of a captured graph where there is one, else as called."""
    return row.get('graph') or row.get('both')


def _cases(record: dict[str, Any]) -> list[str]:
    """Two tables, time and memory, a line a case: ours as it is, all others as multiples of it."""
    names = list(dict.fromkeys(name for entry in record['cases'] for name in entry['results'] if name != 'ours'))
    head = ' | '.join(names)
    lines = [f'| forward + backward | floor, ms | ours, ms | forward alone, ms | {head} |',
             '| --- ' * (4 + len(names)) + '|']
    for entry in record['cases']:
        ours = entry['results'].get('ours', {})
        times = ' | '.join(_multiple(entry['results'].get(name, {}), ours, best) for name in names)
        lines.append(f'| {entry["name"]} | {max(entry["floor"].values()):.1f} | {_figure(best(ours), 1)} | '
                     f'{_figure(ours.get("forward"), 1)} | {times} |')
    lines += ['', f'| extra memory | ours, MB | {head} |', '| --- ' * (2 + len(names)) + '|']
    for entry in record['cases']:
        ours = entry['results'].get('ours', {})
        held = ' | '.join(_multiple(entry['results'].get(name, {}), ours, _bytes) for name in names)
        lines.append(f'| {entry["name"]} | {_figure(_bytes(ours), 1e6)} | {held} |')
    return [*lines, '']


def _bytes(row: dict[str, Any]) -> float | None:
    return row.get('bytes')


def _figure(value: float | None, unit: float) -> str:
    return '-' if value is None else f'{value / unit:.1f}'


def _multiple(row: dict[str, Any], ours: dict[str, Any], of: Callable[[dict[str, Any]], float | None]) -> str:
    if 'failed' in row:
        return row['failed']
    value, reference = of(row), of(ours)
    return f'{value / reference:.2f} ×' if value and reference else '-'


def _goal(record: dict[str, Any], case: str, of: str, against: str | None, key: str) -> float | None:
    entry = next((entry for entry in record['cases'] if entry['name'] == case), None)
    rows = [entry['results'].get(name, {}) for name in (of, against or of)] if entry else [{}, {}]
    value, other = (row.get('bytes') if key == 'bytes' else best(row) for row in rows)
    if value is None or other is None:
        return None
    return other / value if against else value


GOALS = [  # whether on a GPU, what, the case, whose, against whom, of which figure, the bound, its unit
    (False, 'time of the plain path', LOW_CASE, 'ours', 'plain path', 'ms', '≥ 2 ×', 1),
    (False, 'time of the plain path', GPU_CASE, 'ours', 'plain path', 'ms', '≥ 2 ×', 1),
    (False, 'original block, time of the plain path', BLOCK_CASE, 'ours, original blocks', 'plain path', 'ms',
     '≥ 1.2 ×', 1),
    (False, 'time of the plain path', CPU_CASE, 'ours', 'plain path', 'ms', '≥ 2.5 ×', 1),
    (False, 'time of timm NonLocalAttn × 5', CPU_CASE, 'ours', 'timm NonLocalAttn k times', 'ms', '≥ 2 ×', 1),
    (False, 'memory of the plain path', CPU_CASE, 'ours', 'plain path', 'bytes', '≥ 3 ×', 1),
    (False, 'memory of timm NonLocalAttn × 5', CPU_CASE, 'ours', 'timm NonLocalAttn k times', 'bytes', '≥ 3 ×', 1),
    (True, 'time', GPU_CASE, 'ours', None, 'ms', '≤ 0.8 ms', 1),
    (True, 'extra memory', GPU_CASE, 'ours', None, 'bytes', '< 300 MB', 1e6),
    (True, 'extra memory, recompute', GPU_CASE, 'ours, recompute', None, 'bytes', '< 60 MB', 1e6),
]


def goals(kept: dict[str, Any]) -> list[Goal]:
    """What the operator is held to, on the device that is worst off."""
    rows = []
    for gpu, what, case, of, against, key, bound, unit in GOALS:
        found = [(value, device) for device, record in kept.items() if bool(record['versions']['cuda']) == gpu
                 if (value := _goal(record, case, of, against, key)) is not None]
        value, device = (min if against else max)(found, default=(None, ''))
        shown = None if value is None else f'{value / unit:.2f} {bound.split()[-1]}'
        rows.append(Goal(f'{what}{" on a GPU" if gpu else ""}, {case}', bound, shown, device))
    return rows


def report(kept: dict[str, Any]) -> str:
    """The part of BENCHMARKS.md about the stage: every device's figures."""
    lines = [
        '## Nonlocal stage', '',
        'k nonlocal steps on 64 channels, 32 inside, all contenders in turn in one run; medians of forward + backward, '
        'as a captured graph where the device has those; × is a multiple of ours. Extra memory is the peak of what it '
        'allocates, without the result and the gradients. Floor: the longest of what the arithmetic, the exponentials '
        "and the bytes take at the machine's own rates, with A made anew whenever it is used. All figures are in "
        f'`benchmarks/stage.json`; `{COMMAND}` and then `python -m benchmarks.stage --render DIR/stage.json` adds '
        'another device.', '']
    for device, record in kept.items():
        wrong = [check for check in record['checks'] if not check['right']]
        lines += [f'### {device}', '',
                  f'{provenance(record)}, `{record["command"]}`. {len(record["checks"])} outputs were '
                  f'compared with float64 first, {len(wrong)} of them were wrong.', '', *_cases(record),
                  *extras(record)]
    return '\n'.join(lines).rstrip()


def extras(record: dict[str, Any]) -> list[str]:
    """What only GPUs have: attention backends, tiles, longest kernels."""
    lines = []
    if record['attention']:
        lines += ['#### One application of A by scaled_dot_product_attention, B = 128, M = 1024, D = 32', '',
                  '| backend | forward ms | forward + backward ms |', '| --- ' * 3 + '|']
        lines += [f'| {row["backend"]} | {row["failed"]} | |' if 'failed' in row else
                  f'| {row["backend"]} | {row["forward"]:.3f} | {row["both"]:.3f} |' for row in record['attention']]
        lines.append('')
    if record['tiles']:
        lines += ['#### Tiles (owned, step, warps, stages)', '', '| kernel | tile | ms | |', '| --- ' * 4 + '|']
        lines += [f'| {row["kernel"]} | {tuple(row["tile"])} | {row.get("failed") or format(row["ms"], ".3f")} | '
                  f'{"default" if row.get("default") else ""} |' for row in record['tiles']]
        lines.append('')
    if record['kernels']:
        lines += [f'#### Longest kernels, {GPU_CASE}', '', '| kernel | us a step | launches |', '| --- ' * 3 + '|']
        lines += [f'| `{row["name"]}` | {row["us"]:.1f} | {row["count"]:g} |' for row in record['kernels']]
        lines.append('')
    return lines


def table(record: dict[str, Any]) -> str:
    """What the command prints last: goals, headline, what failed."""
    headline = GPU_CASE if record['versions']['cuda'] else CPU_CASE
    first = [entry for entry in record['cases'] if entry['name'] == headline]
    lines = [*goals_table(goals({record['device']: record})), '', *_cases({**record, 'cases': first})]
    lines += [f'WRONG: {check["what"]}: {check["error"]:.1e} > {check["tolerance"]:.0e}'
              for check in record['checks'] if not check['right']]
    fastest: dict[str, dict[str, Any]] = {}
    for row in record['tiles']:
        if 'ms' in row and row['ms'] < fastest.get(row['kernel'], row)['ms'] * 1.0001:
            fastest[row['kernel']] = row
    lines += [f'fastest tile of {name}: {tuple(row["tile"])}, {row["ms"]:.3f} ms' for name, row in fastest.items()]
    return '\n'.join([*lines, *(f'failed: {line}' for line in record['failed'])])
