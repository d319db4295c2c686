"""How spectra are shown: a table, JSON, a picture."""

import json
from itertools import groupby
from pathlib import Path

from .spectrum import TOP, Spectrum

NEGATIVE, POSITIVE = '#2166ac', '#b2182b'


def table(source: str, spectra: list[Spectrum]) -> str:
    """A line a block under a line a stage; counts are among the top eigenvalues by magnitude."""
    lines = [source]
    for stage, blocks in groupby(spectra, key=lambda record: record.stage):
        blocks = list(blocks)
        first = blocks[0]
        lines += ['', f"{stage}: {first.kind}, C = {first.channels}, C' = {first.inner_channels}; "
                      f'eigenvalues of (W + Wᵀ)/2',
                  f'{"block":>5}  {f"top {len(first.top)}: neg":>11} {"pos":>4} {"min":>10} {"max":>10} '
                  f'{"trace":>10} {"norm":>9}']
        lines += [f'{record.index:>5}  {record.negative:>11} {record.positive:>4} {min(record.eigenvalues):>10.4f} '
                  f'{max(record.eigenvalues):>10.4f} {record.trace:>10.4f} {record.norm:>9.4f}' for record in blocks]
    return '\n'.join(lines)


def to_json(targets: list[tuple[str, str, list[Spectrum]]]) -> str:
    """`schema` and `targets`, each with its input, its source and its blocks (`Spectrum.to_dict`)."""
    return json.dumps({
        'schema': 'timm_nonlocal.inspect/1',
        'targets': [{'input': target, 'source': source, 'blocks': [record.to_dict() for record in spectra]}
                    for target, source, spectra in targets],
    }, indent=2, allow_nan=False)


def plot(path: str, targets: list[tuple[str, str, list[Spectrum]]]) -> None:
    """A picture in the manner of the paper's Figure 1: a row a target, a panel a block, bars of the top eigenvalues.

    Args:
        path: .png, .svg or .pdf; written beside and renamed.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: a suffix that matplotlib cannot write.
    """
    from matplotlib.figure import Figure

    columns = max(len(spectra) for _, _, spectra in targets)
    figure = Figure(figsize=(1 + 2.6 * columns, 0.8 + 2.2 * len(targets)), layout='constrained')
    axes = figure.subplots(len(targets), columns, squeeze=False, sharex=True)
    for row, (target, _, spectra) in zip(axes, targets, strict=True):
        limit = 1.05 * max(abs(record.top[0]) for record in spectra) or 1.0
        for panel in row[len(spectra):]:
            panel.set_axis_off()
        for panel, record in zip(row, spectra, strict=False):
            panel.bar(range(1, len(record.top) + 1), record.top,
                      color=[NEGATIVE if value < 0 else POSITIVE for value in record.top])
            panel.axhline(0, color='black', linewidth=0.5)
            panel.set(ylim=(-limit, limit), title=f'{record.stage} {record.index}: '
                                                  f'{record.negative}− / {record.positive}+')
            panel.title.set_fontsize('small')
        row[0].set_ylabel(Path(target).name, fontsize='small')
    figure.supxlabel(f'top {TOP} eigenvalues of (W + Wᵀ)/2 by magnitude', fontsize='small')
    final = Path(path)
    beside = final.with_name(f'.part.{final.name}')
    try:
        figure.savefig(beside, dpi=150)
        beside.replace(final)
    finally:
        beside.unlink(missing_ok=True)
