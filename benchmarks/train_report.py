"""What the figures of training steps are held against, and how they are shown: a table, and a part of BENCHMARKS.md."""

from dataclasses import dataclass
from typing import Any

from benchmarks.goals import Goal, provenance

__all__ = ['TARGETS', 'goals', 'report', 'table']


@dataclass(frozen=True)
class Target:
    """Milliseconds a step, batch 128, one seed.

    Attributes:
        floor: the bytes that must move once at 3 TB/s (16-bit activations, batch norm and residuals fused into the
            convolutions), or the exponentials and matrix products of the affinity, whichever is longer.
        goal: what the code is to reach.
    """

    floor: float
    goal: float


TARGETS = {
    'preresnet20': Target(0.37, 0.84),
    'preresnet20_nl_proposed_k5': Target(1.2, 2.0),
    'preresnet56': Target(0.9, 2.2),
    'preresnet56_nl_proposed_k5': Target(1.7, 3.5),
}
STABLE = (('symmetric',), ('symmetric', 'stable'))  # `nl_args`, without and with it
STABLE_COSTS = 1.05  # times a step without it
FIVE_SEEDS = 4.0  # five seeds of preresnet20 take at most so many times one


def table(record: dict[str, Any]) -> str:
    """A line a case, with the ratio to the floor and, for several seeds, to one seed."""
    alone = {(_network(row), row['mode']): row['ms'] for row in record['steps'] if row['seeds'] == 1}
    width = max([28, *(len(_network(row)) for row in record['steps'])])
    lines = [f'{"network":<{width}} {"mode":<22} {"seeds":>5} {"ms a step":>9} {"× floor":>7} {"× one":>6} '
             f'{"images/s":>9}']
    for row in record['steps']:
        target = TARGETS.get(row['model']) if record['versions']['cuda'] else None
        ratio = f'{row["ms"] / target.floor:.2f}' if target and row['seeds'] == 1 else '-'
        one = alone.get((_network(row), row['mode']))
        more = f'{row["ms"] / one:.2f}' if one and row['seeds'] > 1 else '-'
        lines.append(f'{_network(row):<{width}} {row["mode"]:<22} {row["seeds"]:>5} {row["ms"]:>9.3f} {ratio:>7} '
                     f'{more:>6} {row["images_per_second"]:>9.0f}')
    for row in record['epochs']:
        lines.append(f'{row["model"]}: an epoch takes {row["wall_seconds"]:.3f} s, steps and test {row["share"]:.0%}')
    for row in record['kernels']:
        lines.append(f'{row["model"]}: {row["kernels_per_step"]:.0f} kernels a step, busy {row["busy"]:.0%}; longest:')
        lines += [f'  {kernel["us_per_step"]:8.1f} us in {kernel["per_step"]:5.1f}  {kernel["name"][:80]}'
                  for kernel in row['longest']]
    lines += [f'{name}: {value:.0f}' for name, value in record['ceilings'].items()]
    return '\n'.join([*lines, *(f'failed: {line}' for line in record['failed'])])


def goals(kept: dict[str, Any]) -> list[Goal]:
    """A step of each network on a GPU, the fastest way that was measured; five seeds of one; the share of an epoch."""
    gpus = {device: record for device, record in kept.items() if record['versions']['cuda']}
    found = []
    for model, target in TARGETS.items():
        found.append(_step(model, 1, f'≤ {target.goal} ms', gpus))
        if model == 'preresnet20':
            found.append(_step(model, 5, f'≤ {FIVE_SEEDS:g} × one seed', gpus))
    found.append(_stable(gpus))
    shares = [(row['share'], device) for device, record in gpus.items() for row in record['epochs']]
    share, device = min(shares, default=(None, ''))
    found.append(Goal('share of an epoch that steps and test take', '> 90 %',
                      None if share is None else f'{100 * share:.0f} %', device))
    return found


def report(kept: dict[str, Any]) -> str:
    """The part of BENCHMARKS.md about training: every device's figures."""
    lines = [
        '## Training', '',
        'One step of batch 128 in milliseconds of device time (crop, flip, forward, backward, update and meters). The '
        'floor of a step on a GPU counts the bytes that must move at 3 TB/s, or the arithmetic of the affinity, '
        'whichever takes longer: ' + ', '.join(f'{model} {target.floor} ms' for model, target in TARGETS.items())
        + '. Steps on a CPU are in [docs/experiments.md](docs/experiments.md).']
    for device, record in kept.items():
        lines += ['', f'### {device}', '', f'{provenance(record)}.', '', '```', table(record), '```']
    return '\n'.join(lines)


def _network(row: dict[str, Any]) -> str:
    return ' '.join([row['model'], *row.get('nl_args', [])])


def _stable(gpus: dict[str, Any]) -> Goal:
    """How much longer the slowest pair says that a step with stable=True takes."""
    ratios = []
    for device, record in gpus.items():
        without, with_it = ({(row['model'], row['mode']): row['ms'] for row in record['steps']
                             if row.get('nl_args') == list(nl_args)} for nl_args in STABLE)
        ratios += [(with_it[case] / without[case], device) for case in with_it.keys() & without.keys()]
    ratio, device = max(ratios, default=(None, ''))
    return Goal('step with stable=True over one without, on a GPU', f'≤ {STABLE_COSTS:g} ×',
                None if ratio is None else f'{ratio:.3f} ×', device)


def _step(model: str, seeds: int, bound: str, gpus: dict[str, Any]) -> Goal:
    """A goal with the fastest way that was measured for it."""
    what = f'step of {model} on a GPU' + (f', {seeds} seeds' if seeds > 1 else '')
    rows = [(row, device) for device, record in gpus.items() for row in record['steps']
            if (_network(row), row['seeds']) == (model, seeds)]
    if not rows:
        return Goal(what, bound)
    row, device = min(rows, key=lambda found: found[0]['ms'])
    one = [alone['ms'] for alone in gpus[device]['steps']
           if (_network(alone), alone['mode'], alone['seeds']) == (model, row['mode'], 1)]
    measured = f'{row["ms"]:.3f} ms' + (f', {row["ms"] / one[0]:.2f} × one seed' if one and seeds > 1 else '')
    return Goal(f'{what}, {row["mode"]}', bound, measured, device)
