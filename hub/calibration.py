"""hub/calibration.md: every short run that was to settle what the paper leaves open, diverged ones included."""

import ast
from statistics import median

from .results import HUB, Run

PAGE = HUB / 'calibration.md'
HEAD = """# Calibration

The paper leaves open how θ, φ, W_g and W_Z begin, whether the embedded Gaussian's exponent has the factor 1/√C', and
whether θ and φ are one map. What it reports tells choices apart: original k = 3 trains at learning rate 0.1, original
k = 4 does not and does badly at 0.01, proposed k = 6 trains. Made by `python -m hub.cards` from the short runs in
`hub/results.jsonl` that `python -m train.campaign --calibration` made and `python -m train.land` brought there.
"""


def choice(run: Run) -> str:
    """The arguments of the nonlocal part that a run tries, in words."""
    given = ' '.join(run['model_kwargs']).removeprefix('nl_args=')
    return ', '.join(f'{key} {value}' for key, value in ast.literal_eval(given).items()) if given else 'as registered'


def outcome(runs: list[Run]) -> str:
    """The median error, or in which epochs how many runs diverged."""
    lost = sorted(run['diverged_epoch'] for run in runs if run['diverged_epoch'])
    errors = [run['final_error'] for run in runs if not run['diverged_epoch']]
    parts = [f'{median(errors):.1f} %'] if errors else []
    if lost:
        parts.append(f'{len(lost)} of {len(runs)} diverged (epoch {", ".join(map(str, lost))})')
    return ', '.join(parts)


def text(runs: list[Run]) -> str:
    """The whole page: a line a choice, a column a network and learning rate."""
    tried: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        if run.get('kind') == 'calibration':
            probe = f'{run["architecture"]}, lr {run["recipe"]["lr"]:g}, {run["recipe"]["epochs"]} epochs'
            tried.setdefault(choice(run), {}).setdefault(probe, []).append(run)
    if not tried:
        return f'{HEAD}\nNo such run has been made yet.\n'
    probes = sorted({probe for row in tried.values() for probe in row})
    lines = ['Median test error after the last epoch, and what diverged; n runs.', '',
             f'| choice | {" | ".join(probes)} | n |', '| --- |' + ' --- |' * (len(probes) + 1)]
    for name, row in tried.items():
        cells = [outcome(row[probe]) if probe in row else 'missing' for probe in probes]
        lines.append(f'| {name} | {" | ".join(cells)} | {sum(map(len, row.values()))} |')
    return '\n'.join([HEAD, *lines, ''])
