"""How figures look, and what is drawn in a panel. matplotlib is imported on use, so that cards need none."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from timm_nonlocal import files, paper

from .results import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .overview import Expected, Spectra

__all__ = ['Drawn', 'curve', 'digest', 'figure', 'overview']

MARKERS = 'osD^v<'


class Drawn(NamedTuple):
    """A panel with its data: by name, the top eigenvalues of a block or the training loss after every epoch.

    `missing` says what has no data, `verdict` what the data says of the paper's claim.
    """

    panel: paper.Panel
    series: dict[str, tuple[float, ...]]
    missing: list[str]
    verdict: str


def digest(shown: list[Any]) -> str:
    """A name of what is shown, kept inside a picture so that a stale one is noticed."""
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def figure(path: Path, panels: list[Drawn], description: str) -> None:
    """A row of the paper's panels; one without data stays empty and says so."""
    from matplotlib.figure import Figure
    sheet = Figure(figsize=(0.6 + 3.6 * len(panels), 3.2), layout='constrained')
    for axes, panel in zip(sheet.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        (_draw_curves if panel.panel.curves else _draw_spectra)(axes, panel)
        axes.set_title(f'({panel.panel.letter}) {panel.panel.title}' if panel.panel.letter else panel.panel.title)
        if not panel.series:
            axes.text(0.5, 0.5, 'missing', transform=axes.transAxes, ha='center', va='center', color='0.5')
    _save(sheet, path, description)


def _draw_spectra(axes: Axes, panel: Drawn) -> None:
    for marker, (name, top) in zip(MARKERS, panel.series.items(), strict=False):
        axes.plot(range(1, len(top) + 1), top, marker, markersize=3, label=name)
    axes.axhline(0, color='black', linewidth=0.5)
    axes.set(xlabel='index, by magnitude', ylabel='eigenvalue of (W + Wᵀ)/2')
    if len(panel.series) > 1:
        axes.legend(fontsize='small')


def _draw_curves(axes: Axes, panel: Drawn) -> None:
    for name, curve in panel.series.items():
        axes.plot(range(1, len(curve) + 1), curve, linewidth=0.8, label=name.rpartition('_')[2].replace('k', 'k = '))
    axes.set(xlabel='epoch', ylabel='training loss', yscale='log')
    if panel.series:
        axes.legend(fontsize='small')


def overview(path: Path, spectra: list[Spectra], expected: Expected, description: str) -> None:
    """A panel a network: all eigenvalues of its blocks, largest first, over what 90 % of random weights show."""
    from matplotlib.figure import Figure
    sheet = Figure(figsize=(8, 3.4), layout='constrained')
    index = range(1, len(expected.mean) + 1)
    for axes, found in zip(sheet.subplots(1, len(spectra), sharey=True, squeeze=False)[0], spectra, strict=True):
        axes.fill_between(index, expected.low, expected.high, color='0.8', linewidth=0, label='random weights, 90 %')
        axes.plot(index, expected.mean, color='0.5', linewidth=0.8, label='their mean')
        for number, block in enumerate(found.blocks):
            axes.plot(index, block, marker='o', markersize=2, linewidth=0.6, color='C0', alpha=0.7,
                      label='' if number else f'trained, {len(found.blocks)} block{"s" * (len(found.blocks) > 1)}')
        axes.axhline(0, color='black', linewidth=0.5)
        axes.set(title=f'{found.record["architecture"]}\nrecipe {found.recipe}, seed {found.record["seed"]}',
                 xlabel='eigenvalues of (W + Wᵀ)/2, largest first')
        axes.title.set_fontsize('medium')
        axes.legend(fontsize='small', frameon=False)
        axes.spines[['top', 'right']].set_visible(False)
    sheet.axes[0].set_ylabel('over their root mean square')
    _save(sheet, path, description)


def curve(path: Path, record: Record) -> None:
    """The training loss and error of one run after every epoch, and the test error after those that were tested."""
    from matplotlib.figure import Figure
    sheet = Figure(figsize=(7.8, 3.2), layout='constrained')
    loss, error = sheet.subplots(1, 2)
    epochs = range(1, len(record['train_loss']) + 1)
    loss.plot(epochs, [math.nan if value is None else value for value in record['train_loss']], linewidth=0.8)
    loss.set(xlabel='epoch', ylabel='training loss', yscale='log')
    error.plot(epochs, record['train_error'], linewidth=0.8, label='train')
    tested = {epoch: value for epoch, value in enumerate(record['test_error'], start=1) if value is not None}
    error.plot([*tested], [*tested.values()], linewidth=0.8, label='test', markersize=3,
               marker='o' if len(tested) < len(record['test_error']) else '')
    error.set(xlabel='epoch', ylabel='error, %', ylim=(0, None))
    error.legend(fontsize='small')
    _save(sheet, path, '')


def _save(sheet: Figure, path: Path, description: str) -> None:
    """The same data gives the same bytes with the same matplotlib."""
    files.write(path, lambda beside: sheet.savefig(
        beside, dpi=150, metadata={'Software': None, 'Description': description}))
