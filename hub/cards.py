"""MODEL_CARD.md and a card for every weight file, made from results.jsonl and the weights.

    python -m hub.cards [--check]

What stands between the markers is generated and what stands outside is kept, so that conclusions can be written by
hand and numbers cannot. --check writes nothing and fails where a card or a picture is not what it would be. Exit codes:
0 all is as it should be; 1 --check found a difference; 2 the results or the cards cannot be used.
"""

import argparse
import math
import re
import sys
from collections import Counter
from pathlib import Path

from timm_nonlocal import paper
from timm_nonlocal.datasets import TEST_IMAGES
from timm_nonlocal.files import write_text
from timm_nonlocal.recipes import RECIPES, SHORT

from . import claims, figures
from .card import card
from .drawing import Drawn
from .generated import block, replace_block, waiting
from .results import (
    HUB,
    PublishError,
    Record,
    Shipped,
    counted,
    deviations,
    load,
    precision,
    recipe_for,
    shipped,
    summary,
)

__all__ = ['CARDS', 'MODEL_CARD', 'current', 'make', 'parts', 'path_of']

MODEL_CARD = HUB.parent / 'MODEL_CARD.md'
CARDS = HUB / 'models'
MODULE = 'hub.cards'
DEPTH = ('depth=29',)  # of 9n + 2 layers: the n of a PreResNet-20 whose units have two layers, 6n + 2
FOUR = 'preresnet20_nl_original_k4'
RATES = {FOUR: SHORT.lr, paper.BASELINE.architecture: recipe_for(FOUR, 'short').lr}  # of short runs, beside their own
STABLE = 'preresnet20_nl_proposed_k5'  # with these arguments: what a guarantee costs, and what depth under it gives
STABLE_ROWS = {'as registered': (), 'symmetric': ("nl_args={'symmetric': True}",),
               'symmetric, stable': ("nl_args={'symmetric': True, 'stable': True}",),
               'symmetric, stable, k = 12': ('nl_k=12', "nl_args={'symmetric': True, 'stable': True}")}


def weights_text(files: list[Shipped]) -> str:
    """Which tags have weights, each with its seed and its error."""
    if not files:
        return "None yet: no tag has weights, and `timm.list_pretrained('preresnet*')` is empty."
    return '\n'.join([
        '| name | final test error, % | seed | sha256 |', '| --- | --- | --- | --- |',
        *(f'| [{file.name}](hub/models/{file.name}.md) | {file.record["final_error"]:.2f} | {file.record["seed"]} | '
          f'`{file.sha256[:12]}` |' for file in files)])


def row_text(row: paper.Row, dataset: str, records: list[Record], files: list[Shipped], recipe: str,
             lr: float | None = None) -> str | None:
    """A network's line in a table; None where no run followed the recipe, at this learning rate in place of its own."""
    found = counted(records, row.architecture, dataset, recipe, lr)
    if not found.all:
        return None
    ours = summary(found.finished)
    cells = [f'{ours.median:.2f}', found.n, f'{ours.lowest:.2f}–{ours.highest:.2f}'] if ours else ['none', found.n, '']
    weights = [f'`{file.name}`' for file in files if file.record in found.finished]
    return (f'| {row.label} | {"not reported" if row.error is None else f"{row.error:.2f}"} | {" | ".join(cells)} | '
            f'{", ".join(weights) or "none"} |')


def table_text(table: paper.Table, records: list[Record], files: list[Shipped], recipe: str = 'paper') -> str:
    """One of the paper's tables with what our runs of a recipe have of it.

    Four blocks take a tenth of the learning rate. Of the short runs they are done with all of it too, and the baseline
    with a tenth, to tell what is the rate's doing: a row each.
    """
    lines = []
    for row in table.rows:
        lines.append(row_text(row, table.dataset, records, files, recipe))
        if recipe == 'short' and (lr := RATES.get(row.architecture)):
            row = row._replace(label=f'{row.label}, learning rate {lr:g}', error=None)
            lines.append(row_text(row, table.dataset, records, files, recipe, lr))
    found = [line for line in lines if line]
    head = [f'### {table.title}, recipe {recipe}', '']
    if found:
        head += [f'| network | paper, median of {paper.RUNS} | ours, median | n | range | weights |',
                 '| --- | --- | --- | --- | --- | --- |', *found, '']
    missing = len(lines) - len(found)
    return '\n'.join([*head, waiting(missing, len(lines), 'rows') if missing else 'All rows are there.'])


def tables_text(records: list[Record], files: list[Shipped]) -> str:
    """Both tables for every recipe, with what is counted in them."""
    others = sum(all(deviations(record, name) for name in RECIPES)
                 and bool(deviations(record, 'short', RATES.get(record['architecture']))) for record in records)
    computed = '; '.join(
        [f'{count} in {name}' for name, count in Counter(map(precision, records)).items()]
        + [f'{count} on {name}' for name, count in Counter(record.get('device') for record in records).items() if name])
    return '\n\n'.join([
        'Test errors in per cent after the last epoch; n is the number of runs that followed the recipe: the paper’s; '
        '`ft`, which inserts the nonlocal modules as the identity into the trained backbone and anneals both, its '
        'baseline the backbone annealed in the same way; `short`, the paper’s in a tenth of its length. A run that '
        'diverged has no final error and is counted apart. Runs in '
        f'`hub/results.jsonl` of other networks or recipes, which are in none of these tables: {others}. The paper '
        f'does not say in which precision it computes. Runs of ours: {computed or "none"}.',
        *(table_text(table, records, files, recipe) for recipe in ('paper', 'ft') for table in paper.TABLES),
        table_text(paper.TABLES[0], records, files, 'short')])


def depth_text(records: list[Record]) -> str:
    """The backbone of the depth that another way to count layers gives, beside the paper's baseline."""
    theirs, said = paper.BASELINE.error, list[str]()
    lines = ['| depth | our error, % | n | the paper’s baseline, % |', '| --- | --- | --- | --- |']
    for label, model_kwargs in (('20 = 9n + 2, as registered', ()), ('29 = 9n + 2, counted another way', DEPTH)):
        found = counted(records, paper.BASELINE.architecture, paper.TABLES[0].dataset, model_kwargs=model_kwargs)
        ours = summary(found.finished)
        error = f'{ours.median:.2f}' if ours else 'none' if found.diverged else 'waits for its run'
        lines.append(f'| {label} | {error} | {found.n} | {theirs:.2f} |')
        if ours and theirs is not None:
            said += ['', difference_text(f'Depth {label[:2]} beside the paper’s', theirs, ours.median,
                                         int(len(found.finished) == 1))]
    return '\n'.join(lines + said)


def difference_text(what: str, less: float, more: float, alone: int) -> str:
    """By how much the second error is higher, in percentage points; where `alone` of the two, 1 or 2, are a single
    run's, beside what chance gives; 0 compares medians."""
    share = (less + more) / 200
    spread = 200 * math.sqrt(alone * share * (1 - share) / TEST_IMAGES)
    verdict = 'no more than chance can give' if abs(more - less) <= spread else 'more than chance gives'
    return f'{what}: {more - less:+.2f} percentage points' + (
        f', {verdict} (± {spread:.2f} for {("one run", "two runs")[alone - 1]} and {TEST_IMAGES:,} test images).'
        if alone else ' between the medians.')


def stable_text(records: list[Record]) -> str:
    """Stages that are stable by construction beside those that are not, with what so few runs can say."""
    dataset = paper.TABLES[0].dataset
    found = {label: counted(records, STABLE, dataset, 'ft', model_kwargs=given) for label, given in STABLE_ROWS.items()}
    errors = {label: ours.median for label, runs in found.items() if (ours := summary(runs.finished))}
    lines = [f'| {label} | {f"{errors[label]:.2f}" if label in errors else "none"} | {runs.n} |'
             for label, runs in found.items() if runs.all]
    missing = len(STABLE_ROWS) - len(lines)
    text = [f'| {STABLE}, recipe ft | our error, % | n |', '| --- | --- | --- |', *lines] if lines else []
    text += ['', waiting(missing, len(STABLE_ROWS), 'rows')] if missing else []
    for less, more, question in (('symmetric', 'symmetric, stable', 'What the guarantee costs'),
                                 ('symmetric, stable', 'symmetric, stable, k = 12', 'What the depth costs')):
        if less in errors and more in errors:
            alone = len(found[less].finished) == len(found[more].finished) == 1
            text += ['', difference_text(question, errors[less], errors[more], 2 * alone)]
    return '\n'.join(text).strip()


def figures_text(drawn: dict[int, list[Drawn]]) -> str:
    """The figures with their captions."""
    parts = ['A count of signs agrees with the paper where every block is more than '
             f'{figures.SIGMAS} standard deviations from chance: weights in general position have as many positive as '
             'negative eigenvalues, trained or not, and what training changes is which are large.']
    for number, caption in figures.captions(drawn).items():
        if any(panel.series for panel in drawn[number]):
            parts.append(f'![Figure {number}](hub/figures/figure{number}.png)')
        parts.append(caption)
    return '\n\n'.join(parts)


def parts(records: list[Record], files: list[Shipped], drawn: dict[int, list[Drawn]]) -> dict[str, str]:
    """What MODEL_CARD.md's generated parts hold. Raises PublishError for records that no honest table can show."""
    return {'weights': weights_text(files), 'tables': tables_text(records, files), 'figures': figures_text(drawn),
            'conclusions': claims.text(records), 'depth': depth_text(records), 'stable': stable_text(records)}


def update(text: str, made: tuple[str, str]) -> str:
    """A model's card with front matter and generated part made anew; what was written after it is kept."""
    front_matter, body = made
    text = re.sub(r'\A---\n.*?\n---\n', '', text or f'{block("card", MODULE, body)}\n', flags=re.DOTALL)
    return f'---\n{front_matter}\n---\n{replace_block(text, "card", MODULE, body)}'


def path_of(file: Shipped) -> Path:
    return CARDS / f'{file.name}.md'


def current(file: Shipped, records: list[Record]) -> str:
    """A model's card as it should be now, with what was written by hand."""
    path = path_of(file)
    return update(path.read_text() if path.is_file() else '', card(file, records))


def make(folder: Path = HUB.parent) -> tuple[dict[Path, str], list[str]]:
    """What every card should hold, and what is wrong beside them. Raises PublishError."""
    records = load()
    files = shipped(records)
    drawn = figures.collect(records, files)
    text = MODEL_CARD.read_text()
    for name, content in parts(records, files, drawn).items():
        text = replace_block(text, name, MODULE, content)
    cards = {MODEL_CARD: text}
    cards |= {path_of(file): current(file, records) for file in files}
    problems = [f'{path.relative_to(folder)} has no weights: delete it'
                for path in sorted(CARDS.glob('*.md')) if path not in cards]
    return cards, problems + figures.stale(drawn, records)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog='python -m hub.cards', description=__doc__.split('\n\n')[0],
                                     allow_abbrev=False)
    parser.add_argument('--check', action='store_true', help='write nothing; fail where a card would change')
    args = parser.parse_args(argv)
    try:
        cards, problems = make()
    except PublishError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    for path, text in cards.items():
        name = path.relative_to(HUB.parent)
        if path.is_file() and path.read_text() == text:
            continue
        if args.check:
            problems.append(f'{name} is not what hub/results.jsonl and the weights make it: run python -m hub.cards')
            continue
        write_text(path, text)
        print(name)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if args.check and problems else 0


if __name__ == '__main__':
    sys.exit(main())
