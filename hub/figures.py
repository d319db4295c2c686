"""Figures 1 to 4 of the paper from our own runs: its layout, our data, and captions that say what agrees.

    python -m hub.figures

Spectra are those of the shipped weights, or of the epochs that the run in results.jsonl kept; training curves are the
run's. The networks of a panel all follow one recipe. What has no data yet is named and left out of the picture. Exit
codes: 0 all drawn; 1 panels are missing; 2 the results cannot be used.
"""

import argparse
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from timm_nonlocal import paper
from timm_nonlocal.analysis.random_weights import negative_of_random_weights
from timm_nonlocal.recipes import PAPER, RECIPES, Recipe

from . import drawing, overview
from .drawing import Drawn
from .overview import SIZE
from .results import (
    HUB,
    PublishError,
    Record,
    Shipped,
    counted,
    deviations,
    diverged,
    load,
    median_records,
    recipe_name,
    shipped,
)
from .spectra import kept, of_weights

__all__ = ['SIGMAS', 'beyond_chance', 'captions', 'collect', 'signs', 'stale']

FOLDER = HUB / 'figures'
OVERVIEW = 'overview.png'
SIGMAS = 2  # a count says something where it is this far from chance
SHOWN = 'paper', 'short'  # recipes that figures may show, the preferred one first


class Source(NamedTuple):
    """Where the figures take a network from: its shipped weights, and the run that stands for it."""

    weights: Shipped | None
    record: Record


def source(architecture: str, records: list[Record], files: list[Shipped], recipe: str, curves: bool) -> Source | None:
    """What a recipe gave: shipped weights with their run, else a median run, else, for curves, one that diverged."""
    for file in files:
        if (file.architecture, file.dataset, file.recipe) == (architecture, paper.FIGURE_DATASET, recipe):
            return Source(file, file.record)
    found = counted(records, architecture, paper.FIGURE_DATASET, recipe)
    standing = median_records(found.finished) or (found.diverged if curves else [])
    return Source(None, standing[0]) if standing else None


def sources(panel: paper.Panel, records: list[Record], files: list[Shipped]) -> dict[str, Source]:
    """The networks of a panel that one recipe gave, by name: the recipe that gave most of them, of equals the paper's.
    """
    return max(({name: found for name in panel.architectures
                 if (found := source(name, records, files, recipe, panel.curves))} for recipe in SHOWN), key=len)


def _spectrum(panel: paper.Panel, found: Source | None) -> Drawn:
    epochs = Recipe.from_dict(found.record['recipe']).epochs if found else PAPER.epochs
    epoch = round((panel.epoch or PAPER.epochs) * epochs / PAPER.epochs)
    tops, said = [], ''
    if found and panel.epoch is None and found.weights:
        tops = [block.top for block in of_weights(found.weights.path)]
    elif found and (spectra := kept(found.record, epoch)):
        tops = spectra.tops
        said = f'after epoch {spectra.epoch} of {epochs}: ' * (spectra.epoch != (panel.epoch or epochs))
    if not found or not tops:
        wanted = 'weights' if panel.epoch is None else f'the spectrum after epoch {epoch}'
        return Drawn(panel, {}, [f'{wanted} of {panel.architectures[0]}.{paper.FIGURE_DATASET}'], '')
    series = {f'block {number}': top for number, top in enumerate(tops, start=1)}
    return Drawn(panel, series, [], said + _judge_spectrum(panel.claim, tops) + _recipes([found.record]))


def _judge_spectrum(claim: str, tops: list[tuple[float, ...]]) -> str:
    """What the signs say of a claim."""
    if claim == 'large positive':
        largest = max(max(top) / abs(top[0]) for top in tops)
        counts, expected, spread = signs('positive', tops)
        random = all(abs(count - expected) <= SIGMAS * spread for count in counts)
        return (f'{_list(counts)} of the top {len(tops[0])} are positive ({expected:.1f} ± {spread:.1f} by chance), '
                f'the largest of them {largest:.2f} of the greatest magnitude in its block; the paper: many, some of '
                f'large magnitude. {_agrees(largest >= 0.5)} (at least half)' + ', as random weights would' * random)
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


def losses(record: Record) -> tuple[float, ...]:
    """The training loss after every epoch, nan where it was not finite."""
    return tuple(math.nan if loss is None else loss for loss in record['train_loss'])


def control(four: Record, records: list[Record]) -> Record | None:
    """The network without blocks, trained with the learning rate of four blocks where that is not the recipe's own."""
    name, lr = recipe_name(four), Recipe.from_dict(four['recipe']).lr
    if lr == RECIPES[name].lr:
        return None
    found = counted(records, paper.BASELINE.architecture, paper.FIGURE_DATASET, name, lr)
    return next(iter(median_records(found.finished)), None)


def _curves(panel: paper.Panel, found: dict[str, Source], records: list[Record]) -> Drawn:
    series = {name: losses(source.record) for name, source in found.items() if source.record['train_loss']}
    missing = [f'the training curve of {name}.{paper.FIGURE_DATASET}' for name in panel.architectures
               if name not in series]
    recipes = _recipes([found[name].record for name in series])
    if missing:
        return Drawn(panel, series, missing, f'not judged before every curve is there{recipes}')
    lost = [name.rpartition('_k')[2] for name in series if diverged(found[name].record)]
    if lost:
        return Drawn(panel, series, [], f'not judged: with {_list(lost)} it diverged, and there is no final training '
                                        f'loss; the paper: much larger with 4{recipes}')
    *others, four = (curve[-1] for curve in series.values())
    said = (f'final training loss {_list(f"{loss:.3f}" for loss in (*others, four))} for 1 to 4 blocks, with 4 blocks '
            f'{four / max(others):.1f} times the largest of the others')
    if plain := control(found[panel.architectures[-1]].record, records):
        others.append(losses(plain)[-1])
        said += (f', but no block at all, with the learning rate {plain["recipe"]["lr"]:g} of 4, gives '
                 f'{others[-1]:.3f}, so that 4 give {four / others[-1]:.1f} times that')
    return Drawn(panel, series, [], f'{said}; the paper: much larger with 4. {_agrees(four >= 2 * max(others))} '
                                    f'(at least twice){recipes}')


def _recipes(records: list[Record]) -> str:
    """Which recipe runs followed, and a warning where they did not quite."""
    if not records:
        return ''
    found = sorted({f'{record["architecture"]}: {what}' for record in records
                    for what in deviations(record, recipe_name(record))})
    said = [f'recipe {" and ".join(sorted({recipe_name(record) for record in records}))}']
    said += [f'not that recipe: {"; ".join(found)}'] if found else []
    return f' ({"; ".join(said)})'


def _agrees(holds: bool) -> str:
    return 'Agrees' if holds else 'Does not agree'


def _list(values: Iterable[object]) -> str:
    *first, last = map(str, values)
    return f'{", ".join(first)} and {last}' if first else last


def collect(records: list[Record], files: list[Shipped]) -> dict[int, list[Drawn]]:
    """Every panel of every figure with the data there is, by the figure's number."""
    drawn: dict[int, list[Drawn]] = {}
    for figure in paper.FIGURES:
        drawn[figure.number] = []
        for panel in figure.panels:
            found = sources(panel, records, files)
            drawn[figure.number].append(
                _curves(panel, found, records) if panel.curves else _spectrum(panel, found.get(panel.architectures[0])))
    return drawn


def digest(panels: list[Drawn]) -> str:
    """A name of what a figure shows."""
    return drawing.digest([panel.series for panel in panels])


def picture(number: int) -> Path:
    return FOLDER / f'figure{number}.png'


def stale(drawn: dict[int, list[Drawn]], records: list[Record]) -> list[str]:
    """The pictures that do not show the present data, or should not be there."""
    from PIL import Image
    spectra = overview.collect(records)
    wanted = {picture(number): digest(panels) if any(panel.series for panel in panels) else None
              for number, panels in drawn.items()} | {FOLDER / OVERVIEW: overview.digest(spectra) if spectra else None}
    return [f'{path.relative_to(HUB.parent)} does not show the present data: run python -m hub.figures'
            for path, expected in wanted.items()
            if expected != (Image.open(path).info.get('Description') if path.is_file() else None)]


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
    try:
        records = load()
        drawn = collect(records, shipped(records))
    except PublishError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    for number, panels in drawn.items():
        if any(panel.series for panel in panels):
            drawing.figure(picture(number), panels, digest(panels))
            print(f'{picture(number).relative_to(HUB.parent)}')
        else:
            picture(number).unlink(missing_ok=True)
    if spectra := overview.collect(records):
        drawing.overview(FOLDER / OVERVIEW, spectra, overview.chance(), overview.digest(spectra))
        print(f'{(FOLDER / OVERVIEW).relative_to(HUB.parent)}')
    else:
        (FOLDER / OVERVIEW).unlink(missing_ok=True)
    missing = [f'Figure {number}{f" ({panel.panel.letter})" if panel.panel.letter else ""}: {what}'
               for number, panels in drawn.items() for panel in panels for what in panel.missing]
    for line in missing:
        print(f'missing: {line}', file=sys.stderr)
    return 1 if missing else 0


if __name__ == '__main__':
    sys.exit(main())
