"""Brings finished runs home: their lines into hub/results.jsonl, weights into the package, then cards and figures.

    python -m train.land DIR…

A DIR is a run's folder or one that holds such folders; runs that are not finished wait. `hub.results.to_ship` says
whose weights ship. Runs that used a part of the images, and those of code that is unknown or not in the history, do not
land; those that several processes shared have their line, and count in no table. What has landed stays.

Exit codes: 0 done; 2 a DIR or a file in it is off, and nothing was changed, or a page cannot be made, which is said.
"""

import argparse
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from hub import cards, figures
from hub.folder import last_line
from hub.results import PublishError, diverged, to_ship
from timm_nonlocal.datasets import TEST_IMAGES, TRAIN_IMAGES
from timm_nonlocal.files import sha256
from train.options import Parser
from train.records import run_dir
from train.records.run_dir import read_results, write_lines
from train.records.runs import ROOT, Run
from train.records.state import RunError, write


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, prog='python -m train.land')
    parser.add_argument('folders', nargs='+', metavar='DIR', help='folders of runs, or folders that hold them')
    parser.add_argument('--results', default=str(ROOT / 'hub' / 'results.jsonl'), metavar='FILE')
    parser.add_argument('--weights', default=str(ROOT / 'timm_nonlocal' / 'weights'), metavar='FOLDER')
    return parser.parse_args(argv)


def finished(folders: list[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Every finished run below the folders with its line.

    Raises:
        RunError: there is none in one of them, or one cannot land.
    """
    found = []
    for folder in folders:
        runs = [path.parent for path in sorted(folder.rglob(run_dir.RESULTS))]
        if not runs:
            raise RunError(f'{folder} holds no finished run, which has a {run_dir.RESULTS}')
        for run in runs:
            for record in read_results(run / run_dir.RESULTS):
                check(run, record)
                found.append((run, record))
    return found


def check(folder: Path, record: dict[str, Any]) -> None:
    """Raises RunError for a run that cannot land."""
    if record.get('limit'):
        raise RunError(f'{folder} was trained on the first {record["limit"]} images only: it does not land')
    train, test = record.get('images', (TRAIN_IMAGES, TEST_IMAGES))
    if (train, test) != (TRAIN_IMAGES, TEST_IMAGES):
        raise RunError(f'{folder} was trained on {train} images and tested on {test}, where {record["dataset"]} has '
                       f'{TRAIN_IMAGES} and {TEST_IMAGES}: it does not land')
    for commit in record.get('commits') or [record.get('commit')]:
        if not commit or commit.endswith('-dirty') or not in_history(commit):
            made_by = f'{commit}, which is not in the history' if commit else 'an unknown commit'
            raise RunError(f'{folder} was made by {made_by}: run it from committed code, with GIT_COMMIT where git is '
                           f'not')
    model = folder / run_dir.MODEL
    if not model.is_file() or sha256(model) != record['sha256']:
        raise RunError(f'{model} is missing, or not what {run_dir.RESULTS} says: its sha256 is to be '
                       f'{record["sha256"][:12]}…')


def in_history(commit: str) -> bool:
    """Whether a commit is among those of this repository's HEAD; true where there is no repository to ask."""
    try:
        result = subprocess.run(['git', 'merge-base', '--is-ancestor', commit, 'HEAD'], cwd=ROOT, capture_output=True)
        known = subprocess.run(['git', 'rev-parse', '--git-dir'], cwd=ROOT, capture_output=True).returncode == 0
    except OSError:  # no git
        return True
    return result.returncode == 0 or not known


def land(folders: list[Path], results: Path, weights: Path) -> list[str]:
    """Adds what is new; gives a line about everything that was done or could not be.

    Raises:
        RunError, PublishError: a folder has no results, a run cannot land, or no tables can be made with it. Nothing
            was written.
    """
    published, runs, said = read_results(results), finished(folders), []
    known = {Run.from_dict(record).key for record in published}
    for _, record in runs:
        run = Run.from_dict(record)
        if run.key not in known:
            known.add(run.key)
            published.append(record)
            end = f'diverged in epoch {record["diverged_epoch"]}' if diverged(record) else (
                f'final error {record["final_error"]:.2f} %')
            said.append(f'{run.name}: {end}' + f', on {run.processes} processes: in no table' * (run.processes > 1))
    ships = to_ship(published)
    cards.parts(published, [], figures.collect(published, []))  # whatever is off raises before anything is written
    write_lines(results, published)
    for name, record in ships.items():
        path = weights / f'{name}.safetensors'
        if path.is_file() and sha256(path) == record['sha256']:
            continue
        folder = next((folder for folder, line in runs if line['sha256'] == record['sha256']), None)
        if folder:
            write(path, partial(shutil.copyfile, folder / run_dir.MODEL))
            said.append(f'{path.name}: the weights of {folder.name}')
        else:
            said.append(f'{path.name}: its weights are in none of these folders')
    return said


def make_pages() -> None:
    """README's table, the index, figures and cards, in processes that see the new files."""
    for page in ('hub.index', 'hub.figures', 'hub.cards'):
        result = subprocess.run([sys.executable, '-m', page], cwd=ROOT, capture_output=True, text=True)
        said = last_line(result.stderr)
        if result.returncode and not (page == 'hub.figures' and said.startswith('missing')):
            raise RunError(f'the runs have landed, but python -m {page} fails: {said}')


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        print('\n'.join(land([Path(folder) for folder in args.folders], Path(args.results), Path(args.weights))
                        or ['nothing new']))
        if Path(args.results).resolve() == ROOT / 'hub' / 'results.jsonl':
            make_pages()
    except (RunError, PublishError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
