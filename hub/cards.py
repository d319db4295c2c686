"""MODEL_CARD.md and a card for every weight file, made from results.jsonl and the weights.

    python -m hub.cards [--check]

What stands between the markers is generated and what stands outside is kept, so that conclusions can be written by
hand and numbers cannot. --check writes nothing and fails where a card or a picture is not what it would be. Exit codes:
0 all is as it should be; 1 --check found a difference; 2 the results or the cards cannot be used.
"""

import argparse
import re
import sys
from pathlib import Path

from hub import claims, figures
from timm_nonlocal import paper
from timm_nonlocal.recipes import RECIPES

from .card import card
from .results import HUB, PublishError, Run, Shipped, counted, deviations, load, shipped, summary, write

MODEL_CARD = HUB.parent / 'MODEL_CARD.md'
CARDS = HUB / 'models'
BEGIN, END = '<!-- begin {}: made by python -m hub.cards -->', '<!-- end {} -->'


def between(text: str, name: str, content: str) -> str:
    """The text with the block of a name replaced. Raises PublishError if its two markers are not there once each."""
    begin, end = BEGIN.format(name), END.format(name)
    if (text.count(begin), text.count(end)) != (1, 1) or text.index(begin) > text.index(end):
        raise PublishError(f'the lines {begin} and {end} must both be there, once each and in this order')
    return f'{text[:text.index(begin)]}{begin}\n\n{content}\n\n{text[text.index(end):]}'


def weights_text(files: list[Shipped]) -> str:
    """Which tags have weights, each with its seed and its error."""
    if not files:
        return "None yet: no tag has weights, and `timm.list_pretrained('preresnet*')` is empty."
    return '\n'.join([
        '| name | final test error, % | seed | sha256 |', '| --- | --- | --- | --- |',
        *(f'| [{file.name}](hub/models/{file.name}.md) | {file.run["final_error"]:.2f} | {file.run["seed"]} | '
          f'`{file.sha256[:12]}` |' for file in files)])


def table_text(table: paper.Table, runs: list[Run], files: list[Shipped], recipe: str = 'paper') -> str:
    """One of the paper's tables with what our runs of a recipe have of it."""
    lines, missing = [], 0
    for row in table.rows:
        found = counted(runs, row.architecture, table.dataset, recipe)
        if not (ours := summary(found)):
            missing += 1
            continue
        lost = sum(run.get('diverged_epoch') is not None for run in found)
        cells = [f'{ours.median:.2f}', f'{ours.n}' + f', {lost} diverged' * bool(lost),
                 f'{ours.lowest:.2f}–{ours.highest:.2f}']
        weights = [f'`{file.name}`' for file in files if file.run in found]
        lines.append(f'| {row.label} | {"not reported" if row.error is None else f"{row.error:.2f}"} | '
                     f'{" | ".join(cells)} | {", ".join(weights) or "none"} |')
    head = [f'### {table.title}, recipe {recipe}', '']
    if lines:
        head += [f'| network | paper, median of {paper.RUNS} | ours, median | n | range | weights |',
                 '| --- | --- | --- | --- | --- | --- |', *lines, '']
    waiting = f'{missing} of {len(table.rows)} rows wait for runs.' if missing else 'All rows are there.'
    return '\n'.join([*head, waiting])


def tables_text(runs: list[Run], files: list[Shipped]) -> str:
    """Both tables for every recipe, with what is counted in them."""
    others = sum(all(deviations(run, recipe) for recipe in RECIPES) for run in runs)
    return '\n\n'.join([
        'Test errors in per cent after the last epoch; n is the number of runs that followed the recipe: the paper’s; '
        '`ft`, which inserts the nonlocal modules as the identity into the trained backbone and anneals both, its '
        'baseline the backbone annealed in the same way; `short`, the paper’s in a tenth of its length. Runs in '
        f'`hub/results.jsonl` that followed none of them, and are not counted: {others}.',
        *(table_text(table, runs, files, recipe) for recipe in ('paper', 'ft') for table in paper.TABLES),
        table_text(paper.TABLES[0], runs, files, 'short')])


def figures_text(drawn: dict[int, list[figures.Drawn]]) -> str:
    """The figures with their captions."""
    parts = ['A count of signs agrees with the paper where every block is more than '
             f'{figures.SIGMAS} standard deviations from chance: weights in general position have as many positive as '
             'negative eigenvalues, trained or not, and what training changes is which are large.']
    for number, caption in figures.captions(drawn).items():
        if any(panel.series for panel in drawn[number]):
            parts.append(f'![Figure {number}](hub/figures/figure{number}.png)')
        parts.append(caption)
    return '\n\n'.join(parts)


def model_card(text: str, runs: list[Run], files: list[Shipped], drawn: dict[int, list[figures.Drawn]]) -> str:
    """MODEL_CARD.md with its generated parts made anew."""
    for name, content in (('weights', weights_text(files)), ('tables', tables_text(runs, files)),
                          ('figures', figures_text(drawn)), ('conclusions', claims.text(runs))):
        text = between(text, name, content)
    return text


def update(text: str, made: tuple[str, str]) -> str:
    """A model's card with front matter and generated part made anew; what was written after it is kept."""
    front_matter, body = made
    if not text:
        text = f'{BEGIN.format("card")}\n{END.format("card")}\n'
    text = re.sub(r'\A---\n.*?\n---\n', '', text, flags=re.DOTALL)
    return f'---\n{front_matter}\n---\n{between(text, "card", body)}'


def path_of(file: Shipped) -> Path:
    return CARDS / f'{file.name}.md'


def current(file: Shipped, runs: list[Run]) -> str:
    """A model's card as it should be now, with what was written by hand."""
    path = path_of(file)
    return update(path.read_text() if path.is_file() else '', card(file, runs))


def make(folder: Path = HUB.parent) -> tuple[dict[Path, str], list[str]]:
    """What every card should hold, and what is wrong beside them. Raises PublishError."""
    runs = load()
    files = shipped(runs)
    drawn = figures.collect(runs, files)
    cards = {MODEL_CARD: model_card(MODEL_CARD.read_text(), runs, files, drawn)}
    cards |= {path_of(file): current(file, runs) for file in files}
    problems = [f'{path.relative_to(folder)} has no weights: delete it'
                for path in sorted(CARDS.glob('*.md')) if path not in cards]
    return cards, problems + figures.stale(drawn)


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
        write(path, text)
        print(name)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if args.check and problems else 0


if __name__ == '__main__':
    sys.exit(main())
