"""Spectra as pictures in the manner of the paper's Figures 1 to 4: a row a target, a panel a block."""

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import files
from ..analysis.dynamics import cfl
from ..analysis.spectra import Spectrum
from .report import Result, Stage, printable

__all__ = ['bars', 'drawing', 'energies', 'plane', 'plot']

NEGATIVE, POSITIVE, INSIDE, OUTSIDE, FRAME = '#2166ac', '#b2182b', '#4d4d4d', '#d95f02', '#808080'


def plot(path: Path, results: list[Result], overlay: bool = False, share_y: bool = True, dpi: int = 150) -> None:
    """Bars of the top eigenvalues of (W + Wᵀ)/2; where stability was asked for, W's own in the complex plane below.

    Args:
        path: .png, .svg or .pdf; the same bytes for the same input.
        results: those with blocks are drawn.
        overlay: all blocks of a target in one panel.
        share_y: the same scale for every panel.
        dpi: of a .png.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: a suffix that matplotlib cannot write.
        OSError: the file cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    rows = [(result, [(stage, block) for stage in result.stages for block in stage.blocks])
            for result in results if result.stages]
    columns = 1 if overlay else max(len(blocks) for _, blocks in rows)
    planes = any(stage.stability for result in results for stage in result.stages)
    width, height = (6.0 if overlay else 1 + 2.6 * columns), 0.8 + 2.4 * len(rows) * (2 if planes else 1)
    figure = Figure(figsize=(max(width, 4.5), height), layout='constrained')
    axes = figure.subplots(len(rows) * (2 if planes else 1), columns, squeeze=False)
    limit = max((abs(block.top[0]) for _, blocks in rows for _, block in blocks if block.top), default=0)
    for index, (result, blocks) in enumerate(rows):
        line = axes[index * (2 if planes else 1)]
        own = limit if share_y else max((abs(block.top[0]) for _, block in blocks if block.top), default=0)
        (_overlaid if overlay else _bars)(line, blocks, own or 1.0)
        line[0].set_ylabel(_label(result), fontsize='small')
        if planes:
            _planes(axes[index * 2 + 1], blocks, overlay)
    kept = {block.top_k for _, blocks in rows for _, block in blocks}
    figure.supxlabel(f'top {"/".join(map(str, sorted(kept)))} eigenvalues of (W + Wᵀ)/2 by magnitude', fontsize='small')
    stamp: dict[str, Any] = {'.svg': {'Date': None}, '.pdf': {'CreationDate': None}}.get(path.suffix, {})
    with matplotlib.rc_context({'svg.hashsalt': 'timm_nonlocal'}):
        files.write(path, lambda beside: figure.savefig(beside, dpi=dpi, metadata=stamp))


def _label(result: Result) -> str:
    source = result.source
    repo = source and source.repo
    name = f'{repo.id}@{(repo.commit or "main")[:8]}' if repo else Path(result.input).name or result.input
    return _literally(f'{name} (untrained)' if source and not source.trained else name)


def _literally(text: str) -> str:
    """As it is printed: what stands between two dollars is a formula to matplotlib."""
    return printable(text).replace('$', r'\$')


def _name(stage: Stage, block: Spectrum) -> str:
    folded = ', BN folded' if block.folded else ''
    return f"{_literally(stage.name) or '(root)'} {block.index}\nC = {block.C}, C' = {block.C_inner}{folded}"


def _inset(block: Spectrum) -> str:
    if block.neg_top is None:
        return 'not finite'
    align = '' if block.alignment is None else f'\nalign {block.alignment:+.2f}'
    expected = f'random {block.neg_top_null:.1f} ± {block.neg_top_null_sd:.1f} −'
    return f'{block.neg_top}− / {block.pos_top}+\n{expected}{align}'


def bars(panel: Any, block: Spectrum, limit: float) -> None:
    """The top eigenvalues in a matplotlib Axes, from -limit to limit."""
    panel.bar(range(1, len(block.top) + 1), block.top,
              color=[NEGATIVE if value < 0 else POSITIVE for value in block.top])
    panel.axhline(0, color='black', linewidth=0.5)
    panel.set_ylim(-limit, limit)


def _bars(line: Sequence[Any], blocks: list[tuple[Stage, Spectrum]], limit: float) -> None:
    for panel in line[len(blocks):]:
        panel.set_axis_off()
    for panel, (stage, block) in zip(line, blocks, strict=False):
        bars(panel, block, 1.45 * limit)
        panel.set_title(_name(stage, block), fontsize='small')
        panel.text(0.97, 0.96, _inset(block), transform=panel.transAxes, ha='right', va='top', fontsize='small')


def _overlaid(line: Sequence[Any], blocks: list[tuple[Stage, Spectrum]], limit: float) -> None:
    panel = line[0]
    for stage, block in blocks:
        panel.plot(range(1, len(block.top) + 1), block.top, '.-', linewidth=0.5,
                   label=f'{_literally(stage.name) or "(root)"} {block.index}: {_inset(block)}'.replace('\n', ', '))
    panel.axhline(0, color='black', linewidth=0.5)
    panel.set_ylim(-1.1 * limit, 1.1 * limit)
    panel.legend(fontsize='x-small', loc='lower center', bbox_to_anchor=(0.5, 1))  # above, where nothing is hidden


def plane(panel: Any, stage: Stage, block: Spectrum, disc: bool = True) -> None:
    """W's eigenvalues in the complex plane in a matplotlib Axes, those that break the CFL condition as crosses."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Circle

    mu, values = (stage.stability or {})['mu_max'], (block.stability or {})['eigenvalues']
    outside = [cfl(torch.tensor([complex(*value)], dtype=torch.complex128), mu, stage.formulation)[0]
               for value in values]
    for marker, color, breaks in (('.', INSIDE, 0), ('x', OUTSIDE, 1)):
        chosen = [value for value, broken in zip(values, outside, strict=True) if broken == breaks]
        panel.plot([value[0] for value in chosen], [value[1] for value in chosen], marker, color=color, markersize=4)
    if disc:
        centre, radius = (1 / mu, 1 / mu) if stage.formulation == 'proposed' else (-1, 1)
        panel.add_patch(Circle((centre, 0), radius, facecolor=(*to_rgb(FRAME), 0.12), edgecolor=FRAME, linewidth=0.8))
        panel.axhline(0, color='black', linewidth=0.3)
        panel.axvline(0, color='black', linewidth=0.3)
        panel.set_aspect('equal', adjustable='datalim')


def energies(panel: Any, found: dict[str, Any]) -> None:
    """What is left of the features' energies after every block in a matplotlib Axes."""
    for name, style in (('dirichlet', 'o-'), ('variance', 's--'), ('power', '^:')):
        panel.plot(range(len(found[name])), found[name], style, color={
            'dirichlet': NEGATIVE, 'variance': OUTSIDE, 'power': INSIDE}[name], markersize=3, linewidth=1.2, label=name)
    values = [value for name in ('dirichlet', 'variance', 'power') for value in found[name] if value]
    if values and max(values) > 20 * min(values):
        panel.set_yscale('log')
        panel.yaxis.set_major_formatter('{x:g}')
    panel.set_xticks(range(len(found['power'])))
    panel.legend(frameon=False, fontsize='small')


def drawing(draw: Callable[[Any], None], width: float, height: float, name: str) -> str:
    """One panel as SVG for a page that holds it, whose variables, font and dark or light scheme it takes.

    Args:
        draw: draws into a matplotlib Axes.
        width, height: in inches.
        name: a word in front of the ids, which are unique in a page.

    Returns:
        `<svg>…</svg>` with --negative, --positive, --inside, --outside and --frame for colours.
    """
    import matplotlib
    from matplotlib.figure import Figure

    text = io.StringIO()
    with matplotlib.rc_context({
            'svg.hashsalt': 'timm_nonlocal', 'svg.fonttype': 'none', 'font.size': 8, 'axes.edgecolor': FRAME,
            'axes.spines.top': False, 'axes.spines.right': False, 'xtick.major.size': 2, 'ytick.major.size': 2,
            'xtick.major.width': 0.5, 'ytick.major.width': 0.5, 'xtick.color': FRAME, 'ytick.color': FRAME,
            'xtick.labelcolor': 'black', 'ytick.labelcolor': 'black', 'axes.linewidth': 0.5}):
        figure = Figure(figsize=(width, height))
        draw(figure.add_axes((0.46 / width, 0.2 / height, 1 - 0.5 / width, 1 - 0.3 / height)))
        figure.savefig(text, format='svg', transparent=True, metadata={'Date': None})
    svg = text.getvalue()[text.getvalue().index('<svg'):]
    svg = re.sub(r'<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>', '', svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf'\g<1>{name}-', svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r'font-size: \1', svg)
    for color, variable in (('#000000', 'currentColor'), (NEGATIVE, 'var(--negative)'), (POSITIVE, 'var(--positive)'),
                            (INSIDE, 'var(--inside)'), (OUTSIDE, 'var(--outside)'), (FRAME, 'var(--frame)')):
        svg = svg.replace(color, variable)
    return svg


def _planes(line: Sequence[Any], blocks: list[tuple[Stage, Spectrum]], overlay: bool) -> None:
    for panel in line[1 if overlay else len(blocks):]:
        panel.set_axis_off()
    for number, (stage, block) in enumerate(blocks):
        panel = line[0 if overlay else number]
        if not block.stability or not stage.stability:
            panel.set_axis_off()
            continue
        plane(panel, stage, block, disc=not overlay or number == 0)
        if not overlay:
            found = block.stability
            panel.set_title(f'{found["outside"]} of {len(found["eigenvalues"])} outside the CFL disc, '
                            f'κ = {found["kappa"]:.2f}', fontsize='small')
