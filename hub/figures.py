"""Figures 1 to 4 of the paper from our own runs: its layout, our data, and captions that say what agrees.

    python -m hub.figures

Spectra are those of the shipped weights, or of the epochs that the run in results.jsonl kept; training curves are the
run's. What has no data yet is named and left out of the picture. Exit codes: 0 all drawn; 1 panels are missing; 2 the
results cannot be used.
"""

import argparse
import hashlib
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

from timm_nonlocal import paper
from timm_nonlocal.analysis.random_weights import negative_of_random_weights
from timm_nonlocal.recipes import PAPER

from .results import HUB, PublishError, Run, Shipped, counted, deviations, load, median_runs, recipe_name, shipped
from .spectra import kept, of_weights

FOLDER = HUB / 'figures'
SIZE = (64, 32)  # C and C' of every figure's blocks, in the first stage
SIGMAS = 2  # a count says something where it is this far from chance


class Drawn(NamedTuple):
    """A panel with its data: by name, the top eigenvalues of a block or the training loss after every epoch.

    `missing` says what has no data, `verdict` what the data says of the paper's claim.
    """

    panel: paper.Panel
    series: dict[str, tuple[float, ...]]
    missing: list[str]
    verdict: str


class Source(NamedTuple):
    """Where the figures take a network from: its shipped weights, and the run that stands for it."""

    weights: Shipped | None
    run: Run | None


def source(architecture: str, runs: list[Run], files: list[Shipped]) -> Source:
    """What the paper's recipe gave, else its tenth: the shipped weights with their run, without them a median run."""
    for file in files:
        if (file.architecture, file.dataset) == (architecture, paper.FIGURE_DATASET) and file.recipe != 'ft':
            return Source(file, file.run)
    for recipe in ('paper', 'short'):
        if middle := median_runs(counted(runs, architecture, paper.FIGURE_DATASET, recipe)):
            return Source(None, middle[0])
    return Source(None, None)


def _spectrum(panel: paper.Panel, found: Source) -> Drawn:
    name, run = f'{panel.architectures[0]}.{paper.FIGURE_DATASET}', found.run
    if panel.epoch is None and found.weights:
        tops = [block.top for block in of_weights(found.weights.path)]
    else:
        epochs = run['recipe']['epochs'] if run else PAPER.epochs
        epoch = round((panel.epoch or PAPER.epochs) * epochs / PAPER.epochs)
        tops = kept(run, epoch) if run else []
        if not tops:
            wanted = 'weights' if panel.epoch is None else f'the spectrum after epoch {epoch}'
            return Drawn(panel, {}, [f'{wanted} of {name}'], '')
    series = {f'block {number}': top for number, top in enumerate(tops, start=1)}
    return Drawn(panel, series, [], _judge_spectrum(panel.claim, tops) + _unlike([run]))


def _judge_spectrum(claim: str, tops: list[tuple[float, ...]]) -> str:
    """What the signs say of a claim."""
    if claim == 'large positive':
        largest = max(max(top) / abs(top[0]) for top in tops)
        counts = _list(sum(value > 0 for value in top) for top in tops)
        return (f'{counts} of the top {len(tops[0])} are positive, the largest of them {largest:.2f} of the greatest '
                f'magnitude in its block; the paper: many, some of large magnitude. '
                f'{_agrees(largest >= 0.5)} (at least half)')
    counts, expected, spread = signs(claim, tops)
    return (f'{_list(counts)} of the top {len(tops[0])} are {claim} ({expected:.1f} ± {spread:.1f} by chance); the '
            f'paper: most. {_agrees(beyond_chance(counts, expected, spread))}')


def signs(claim: str, tops: list[tuple[float, ...]]) -> tuple[list[int], float, float]:
    """How many of each block's top eigenvalues are 'negative' or 'positive', and what chance gives, ± its deviation."""
    sign = -1 if claim == 'negative' else 1
    return [sum(value * sign > 0 for value in top) for top in tops], *negative_of_random_weights(*SIZE, len(tops[0]))


def beyond_chance(counts: list[int], expected: float, spread: float) -> bool:
    """Whether every block's count is `SIGMAS` deviations above chance."""
    return min(counts) > expected + SIGMAS * spread


def losses(run: Run) -> tuple[float, ...]:
    """The training loss after every epoch, nan where it was not finite."""
    return tuple(math.nan if loss is None else loss for loss in run['train_loss'])


def _curves(panel: paper.Panel, found: dict[str, Source]) -> Drawn:
    series = {name: losses(source.run) for name, source in found.items()
              if source.run and source.run.get('train_loss')}
    missing = [f'the training curve of {name}.{paper.FIGURE_DATASET}' for name in found if name not in series]
    if missing:
        return Drawn(panel, series, missing, 'not judged before every curve is there')
    *others, four = (curve[-1] for curve in series.values())
    verdict = 'it diverged' if math.isnan(four) else f'{four / max(others):.1f} times the largest of the others'
    return Drawn(panel, series, [], f'final training loss {_list(f"{loss:.3f}" for loss in (*others, four))} for '
                 f'1 to 4 blocks, with 4 {verdict}; the paper: much larger with 4. '
                 f'{_agrees(not four < 2 * max(others))} (at least twice)' + _unlike(
                     [source.run for source in found.values()]))


def _unlike(runs: list[Run]) -> str:
    """A warning where runs did not follow the paper's recipe, or another one of ours."""
    names = sorted({recipe_name(run) for run in runs})
    found = sorted({f'{run["architecture"]}: {what}' for run in runs for what in deviations(run, recipe_name(run))})
    said = [f'recipe {" and ".join(names)}'] if names != ['paper'] else []
    said += [f'not that recipe: {"; ".join(found)}'] if found else []
    return f' ({"; ".join(said)})' if said else ''


def _agrees(holds: bool) -> str:
    return 'Agrees' if holds else 'Does not agree'


def _list(values) -> str:
    *first, last = map(str, values)
    return f'{", ".join(first)} and {last}' if first else last


def collect(runs: list[Run], files: list[Shipped]) -> dict[int, list[Drawn]]:
    """Every panel of every figure with the data there is, by the figure's number."""
    drawn = {}
    for figure in paper.FIGURES:
        drawn[figure.number] = []
        for panel in figure.panels:
            found = {name: source(name, runs, files) for name in panel.architectures}
            drawn[figure.number].append(
                _curves(panel, found) if panel.curves else _spectrum(panel, found[panel.architectures[0]]))
    return drawn


def digest(panels: list[Drawn]) -> str:
    """A name of what a figure shows, kept inside its picture so that a stale one is noticed."""
    return hashlib.sha256(json.dumps([panel.series for panel in panels]).encode()).hexdigest()


def picture(number: int) -> Path:
    return FOLDER / f'figure{number}.png'


def stale(drawn: dict[int, list[Drawn]]) -> list[str]:
    """The pictures that do not show the present data, or should not be there."""
    from PIL import Image
    found = []
    for number, panels in drawn.items():
        path = picture(number)
        shown = Image.open(path).text.get('Description') if path.is_file() else None
        if shown != (digest(panels) if any(panel.series for panel in panels) else None):
            found.append(f'{path.relative_to(HUB.parent)} does not show the present data: run python -m hub.figures')
    return found


def captions(drawn: dict[int, list[Drawn]]) -> dict[int, str]:
    """What each figure shows and how it compares with the paper's, in Markdown."""
    found = {}
    for figure in paper.FIGURES:
        parts = []
        for panel in drawn[figure.number]:
            said = '; '.join(f'missing: {what}' for what in panel.missing)
            parts.append(f'- {f"({panel.panel.letter}) " if panel.panel.letter else ""}{panel.panel.title}: '
                         f'{"; ".join(filter(None, (said, panel.verdict)))}.')
        found[figure.number] = f'**Figure {figure.number}.** {figure.title} (CIFAR-10, PreResNet-20).\n\n' + '\n'.join(
            parts)
    return found


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(prog='python -m hub.figures', description=__doc__.split('\n\n')[0],
                            allow_abbrev=False).parse_args(argv)
    from hub import drawing
    try:
        runs = load()
        drawn = collect(runs, shipped(runs))
    except PublishError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    for number, panels in drawn.items():
        if any(panel.series for panel in panels):
            drawing.figure(picture(number), panels, digest(panels))
            print(f'{picture(number).relative_to(HUB.parent)}')
        else:
            picture(number).unlink(missing_ok=True)
    missing = [f'Figure {number}{f" ({panel.panel.letter})" if panel.panel.letter else ""}: {what}'
               for number, panels in drawn.items() for panel in panels for what in panel.missing]
    for line in missing:
        print(f'missing: {line}', file=sys.stderr)
    return 1 if missing else 0


if __name__ == '__main__':
    sys.exit(main())
