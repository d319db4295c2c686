"""How the times of the inspect command are shown, and what they are held against."""

from typing import Any

from benchmarks.goals import Goal, provenance

__all__ = ['goals', 'report']


def goals(kept: dict[str, Any]) -> list[Goal]:
    """Seconds, where there is a goal."""
    return [Goal(f'`inspect`, {row["what"]}', f'≤ {row["goal"]:g} s', f'{row["seconds"]:.3f}', device)
            for device, record in kept.items() for row in record['rows'] if row['goal']]


def report(kept: dict[str, Any]) -> str:
    """The part of BENCHMARKS.md about the inspect command."""
    lines = ['## Inspect', '',
             'Seconds of `python -m timm_nonlocal.inspect … --json` beyond its imports, expectation of random weights '
             'included, on one thread, the fastest of several fresh processes.']
    for device, record in kept.items():
        lines += ['', f'### {device}', '', f'{provenance(record)}.', '',
                  '| what | seconds |', '| --- | --- |']
        lines += [f'| {row["what"]} | {row["seconds"]:.3f} |' for row in record['rows']]
    return '\n'.join(lines)
