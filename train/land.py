"""Brings a campaign home: its lines into hub/results.jsonl, the weights to ship into the package.

    python -m train.land DIR…

Of every row of the paper's tables and figures, and of the registered rest, the weights of the run with the median final
error are shipped: of the lower one of the two in the middle where the number of runs is even. Weights of runs that
diverged are not. Run it after every stretch: what has landed stays, and what is in no DIR is said.

Exit codes: 0 done; 2 a DIR or a file in it is off.
"""

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save as to_bytes

from train import paper
from train.pack import Pack
from train.run_dir import read_results, write_lines
from train.runs import ROOT, Run
from train.state import RunError, write


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m train.land', description=__doc__.split('\n\n')[0], allow_abbrev=False)
    parser.add_argument('folders', nargs='+', metavar='DIR', help='folders of campaigns')
    parser.add_argument('--results', default=str(ROOT / 'hub' / 'results.jsonl'), metavar='FILE')
    parser.add_argument('--weights', default=str(ROOT / 'timm_nonlocal' / 'weights'), metavar='FOLDER')
    return parser.parse_args(argv)


def shipped(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The line whose weights are shipped, by the name of the weights, `<architecture>.<dataset>`."""
    recipes = {(row.run.architecture, row.run.dataset): row.run.recipe for row in paper.rows((1, 2))}
    of_name: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        run = Run.from_dict(record)
        asked_for = recipes.get((run.architecture, run.dataset)) == run.recipe and not (run.model_kwargs or run.limit)
        if asked_for and record['diverged_epoch'] is None:
            of_name.setdefault(f'{run.architecture}.{run.dataset}', []).append(record)
    return {name: sorted(runs, key=lambda run: (run['final_error'], run['seed']))[(len(runs) - 1) // 2]
            for name, runs in of_name.items()}


def land(folders: list[Path], results: Path, weights: Path) -> list[str]:
    """Adds what is new; gives a line about everything that was done or could not be.

    Raises:
        RunError: a folder has no results, or a file does not hold what its line says.
    """
    published, said = read_results(results), []
    known = {Run.from_dict(record).key for record in published}
    packs = [Pack(folder) for folder in folders]
    for pack in packs:
        if not pack.results:
            raise RunError(f'{pack.folder} holds no finished runs')
        for record in pack.results:
            if Run.from_dict(record).key not in known:
                known.add(Run.from_dict(record).key)
                published.append({key: value for key, value in record.items() if key != 'weights'})
                said.append(f'{Run.from_dict(record).name}: final error {record["final_error"]:.2f} %')
    write_lines(results, published)
    for name, record in shipped(published).items():
        path, run = weights / f'{name}.safetensors', Run.from_dict(record)
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == record['sha256']:
            continue
        found = [tensors for pack in packs for line in pack.results
                 if line['sha256'] == record['sha256'] and (tensors := pack.weights(line)) is not None]
        if found:
            write(path, lambda beside, tensors=found[0]: beside.write_bytes(to_bytes(tensors)))
            said.append(f'{path.name}: the weights of {run.name}')
        else:
            said.append(f'{path.name}: the weights of {run.name} are in none of these folders')
    return said


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        print('\n'.join(land([Path(folder) for folder in args.folders], Path(args.results), Path(args.weights))))
    except RunError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
