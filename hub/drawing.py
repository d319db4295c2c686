"""How figures look. matplotlib is imported on use, so that cards need none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .figures import Drawn
    from .results import Run

MARKERS = 'osD^v<'


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


def _draw_spectra(axes, panel: Drawn) -> None:
    for marker, (name, top) in zip(MARKERS, panel.series.items(), strict=False):
        axes.plot(range(1, len(top) + 1), top, marker, markersize=3, label=name)
    axes.axhline(0, color='black', linewidth=0.5)
    axes.set(xlabel='index, by magnitude', ylabel='eigenvalue of (W + Wᵀ)/2')
    if len(panel.series) > 1:
        axes.legend(fontsize='small')


def _draw_curves(axes, panel: Drawn) -> None:
    for name, curve in panel.series.items():
        axes.plot(range(1, len(curve) + 1), curve, linewidth=0.8, label=name.rpartition('_')[2].replace('k', 'k = '))
    axes.set(xlabel='epoch', ylabel='training loss', yscale='log')
    if panel.series:
        axes.legend(fontsize='small')


def curve(path: Path, run: Run) -> None:
    """The training loss, and the training and test error, of one run after every epoch."""
    from matplotlib.figure import Figure
    sheet = Figure(figsize=(7.8, 3.2), layout='constrained')
    loss, error = sheet.subplots(1, 2)
    epochs = range(1, len(run['test_error']) + 1)
    loss.plot(epochs, [math.nan if value is None else value for value in run['train_loss']], linewidth=0.8)
    loss.set(xlabel='epoch', ylabel='training loss', yscale='log')
    for name in ('train_error', 'test_error'):
        error.plot(epochs, run[name], linewidth=0.8, label=name.replace('_error', ''))
    error.set(xlabel='epoch', ylabel='error, %', ylim=(0, None))
    error.legend(fontsize='small')
    _save(sheet, path, '')


def _save(sheet, path: Path, description: str) -> None:
    """Writes beside and renames; the same data gives the same bytes with the same matplotlib."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f'.part.{path.name}')
    try:
        sheet.savefig(beside, dpi=150, metadata={'Software': None, 'Description': description})
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
