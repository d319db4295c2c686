"""Spectra as pictures in the manner of the paper's Figures 1 to 4: a row a target, a panel a block."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import files
from ..analysis.spectra import Spectrum
from .report import Result, Stage, printable

__all__ = ['plot']

NEGATIVE, POSITIVE = '#2166ac', '#b2182b'


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
    return printable(f'{name} (untrained)' if source and not source.trained else name)


def _name(stage: Stage, block: Spectrum) -> str:
    folded = ', BN folded' if block.folded else ''
    return f"{printable(stage.name) or '(root)'} {block.index}\nC = {block.C}, C' = {block.C_inner}{folded}"


def _inset(block: Spectrum) -> str:
    if block.neg_top is None:
        return 'not finite'
    align = '' if block.alignment is None else f'\nalign {block.alignment:+.2f}'
    expected = f'random {block.neg_top_null:.1f} ± {block.neg_top_null_sd:.1f} −'
    return f'{block.neg_top}− / {block.pos_top}+\n{expected}{align}'


def _bars(line: Sequence[Any], blocks: list[tuple[Stage, Spectrum]], limit: float) -> None:
    for panel in line[len(blocks):]:
        panel.set_axis_off()
    for panel, (stage, block) in zip(line, blocks, strict=False):
        panel.bar(range(1, len(block.top) + 1), block.top,
                  color=[NEGATIVE if value < 0 else POSITIVE for value in block.top])
        panel.axhline(0, color='black', linewidth=0.5)
        panel.set_ylim(-1.45 * limit, 1.45 * limit)
        panel.set_title(_name(stage, block), fontsize='small')
        panel.text(0.97, 0.96, _inset(block), transform=panel.transAxes, ha='right', va='top', fontsize='small')


def _overlaid(line: Sequence[Any], blocks: list[tuple[Stage, Spectrum]], limit: float) -> None:
    panel = line[0]
    for stage, block in blocks:
        panel.plot(range(1, len(block.top) + 1), block.top, '.-', linewidth=0.5,
                   label=f'{printable(stage.name) or "(root)"} {block.index}: {_inset(block)}'.replace('\n', ', '))
    panel.axhline(0, color='black', linewidth=0.5)
    panel.set_ylim(-1.1 * limit, 1.1 * limit)
    panel.legend(fontsize='x-small', loc='lower center', bbox_to_anchor=(0.5, 1))  # above, where nothing is hidden


def _planes(line: Sequence[Any], blocks: list[tuple[Stage, Spectrum]], overlay: bool) -> None:
    from matplotlib.patches import Circle

    for panel in line[1 if overlay else len(blocks):]:
        panel.set_axis_off()
    for number, (stage, block) in enumerate(blocks):
        panel = line[0 if overlay else number]
        if not block.stability or not stage.stability:
            panel.set_axis_off()
            continue
        values = block.stability['eigenvalues']
        panel.plot([value[0] for value in values], [value[1] for value in values], '.', markersize=4)
        if not overlay or number == 0:
            mu = stage.stability['mu_max']
            centre, radius = (1 / mu, 1 / mu) if stage.formulation == 'proposed' else (-1, 1)
            panel.add_patch(Circle((centre, 0), radius, fill=False, color='gray', linewidth=0.8))
            panel.axhline(0, color='black', linewidth=0.3)
            panel.axvline(0, color='black', linewidth=0.3)
            panel.set_aspect('equal', adjustable='datalim')
        if not overlay:
            panel.set_title(f'{block.stability["outside"]} of {len(values)} outside the CFL disc, '
                            f'κ = {block.stability["kappa"]:.2f}', fontsize='small')
