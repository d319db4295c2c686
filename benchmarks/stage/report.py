"""How the figures are shown: a table on the terminal, and a part of BENCHMARKS.md."""

from typing import Any

__all__ = ['CPU_CASE', 'GPU_CASE', 'LOW_CASE', 'goals', 'report', 'table']

COMMAND = 'python -m benchmarks.stage --max-minutes 8 --output DIR'
GPU_CASE, CPU_CASE = 'B = 128, M = 1024, k = 5, bfloat16', 'B = 16, M = 1024, k = 5, float32'
LOW_CASE, BLOCK_CASE = CPU_CASE.replace('float32', 'bfloat16'), 'B = 16, M = 1024, k = 1, bfloat16'


def best(row: dict[str, Any]) -> float | None:
    """Milliseconds of forward + backward: of a captured graph where there is one, else as called."""
    return row.get('graph') or row.get('both')


def comparison(entry: dict[str, Any]) -> list[str]:
    """A table of one case: a line for each contender, with its ratios to ours."""
    rows = entry['results']
    ours = rows.get('ours', {})
    head = '| | forward ms | forward + backward ms | as a graph ms | × ours | extra MB | × ours |'
    lines = [f'### {entry["name"]}', '', head, '| --- ' * 7 + '|']
    for name, row in rows.items():
        if 'failed' in row:
            lines.append(f'| {name} | {row["failed"]} | | | | | |')
            continue
        ms, our_ms = best(row), best(ours)
        time = f'{ms / our_ms:.2f}' if ms and our_ms else ''
        memory = f'{row["bytes"] / ours["bytes"]:.1f}' if row.get('bytes') and ours.get('bytes') else ''
        figures = [f'{row[key]:.3f}' if row.get(key) is not None else '-' for key in ('forward', 'both', 'graph')]
        held = f'{row["bytes"] / 1e6:.1f}' if row.get('bytes') is not None else '-'
        lines.append(f'| {name} | {" | ".join(figures)} | {time} | {held} | {memory} |')
    floor = entry['floor']
    lines += ['', f'Floor of forward + backward: {max(floor.values()):.3f} ms, of ' + ', '.join(
        f'{entry["counts"][key] / unit:.4g} {what} {floor[key]:.3f}' for key, unit, what in (
            ('flop', 1e9, 'GFLOP'), ('exponentials', 1e9, 'G exponentials'), ('bytes', 1e6, 'MB'))) + '.', '']
    return lines


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


def goals(kept: dict[str, Any]) -> list[str]:
    lines = ['| forward + backward | case | goal | measured | device |', '| --- ' * 5 + '|']
    for gpu, what, case, of, against, key, bound, unit in GOALS:
        found = [(value, device) for device, record in kept.items() if bool(record['versions']['cuda']) == gpu
                 if (value := _goal(record, case, of, against, key)) is not None]
        value, device = (min if against else max)(found, default=(None, ''))  # the device that is worst off
        shown = 'missing' if value is None else f'{value / unit:.2f}'
        lines.append(f'| {what} | {case} | {bound} | {shown} | {device} |')
    return lines


def report(kept: dict[str, Any]) -> str:
    """The part of BENCHMARKS.md about the stage: goals first, then every device's figures."""
    lines = [
        '## Nonlocal stage', '',
        'k nonlocal steps on 64 channels, 32 inside, all contenders in turn in one run; medians. Extra memory is the '
        'peak of what a forward + backward allocates, without the result and the gradients. Floor: the longest of what '
        "the arithmetic, the exponentials and the bytes take at the machine's own rates, with A made anew whenever it "
        f'is used. GPU figures that are missing are filled by `{COMMAND}` and then `python -m benchmarks.stage '
        '--render DIR/stage.json`.', '', *goals(kept)]
    for device, record in kept.items():
        versions = ', '.join(f'{name} {version}' for name, version in record['versions'].items() if version)
        wrong = [check for check in record['checks'] if not check['right']]
        lines += ['', f'## Nonlocal stage on {device}', '',
                  f'{versions}, commit {record["commit"]}, `{record["command"]}`. {len(record["checks"])} outputs were '
                  f'compared with float64 first, {len(wrong)} of them were wrong.', '']
        for entry in record['cases']:
            lines += comparison(entry)
        lines += extras(record)
    return '\n'.join(lines).rstrip()


def extras(record: dict[str, Any]) -> list[str]:
    """What only GPUs have: attention backends, tiles, longest kernels."""
    lines = []
    if record['attention']:
        lines += ['### One application of A by scaled_dot_product_attention, B = 128, M = 1024, D = 32', '',
                  '| backend | forward ms | forward + backward ms |', '| --- ' * 3 + '|']
        lines += [f'| {row["backend"]} | {row["failed"]} | |' if 'failed' in row else
                  f'| {row["backend"]} | {row["forward"]:.3f} | {row["both"]:.3f} |' for row in record['attention']]
        lines.append('')
    if record['tiles']:
        lines += ['### Tiles (owned, step, warps, stages)', '', '| kernel | tile | ms | |', '| --- ' * 4 + '|']
        lines += [f'| {row["kernel"]} | {tuple(row["tile"])} | {row.get("failed") or format(row["ms"], ".3f")} | '
                  f'{"default" if row.get("default") else ""} |' for row in record['tiles']]
        lines.append('')
    if record['kernels']:
        lines += [f'### Longest kernels, {GPU_CASE}', '', '| kernel | us a step | launches |', '| --- ' * 3 + '|']
        lines += [f'| `{row["name"]}` | {row["us"]:.1f} | {row["count"]:g} |' for row in record['kernels']]
        lines.append('')
    return lines


def table(record: dict[str, Any]) -> str:
    """What the command prints last: goals, headline, what failed."""
    headline = GPU_CASE if record['versions']['cuda'] else CPU_CASE
    lines = goals({record['device']: record})
    for entry in record['cases']:
        if entry['name'] == headline:
            lines += comparison(entry)
    lines += [f'WRONG: {check["what"]}: {check["error"]:.1e} > {check["tolerance"]:.0e}'
              for check in record['checks'] if not check['right']]
    fastest: dict[str, dict[str, Any]] = {}
    for row in record['tiles']:
        if 'ms' in row and row['ms'] < fastest.get(row['kernel'], row)['ms'] * 1.0001:
            fastest[row['kernel']] = row
    lines += [f'fastest tile of {name}: {tuple(row["tile"])}, {row["ms"]:.3f} ms' for name, row in fastest.items()]
    return '\n'.join([*lines, *(f'failed: {line}' for line in record['failed'])])
