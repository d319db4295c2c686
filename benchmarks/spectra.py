"""How long the inspect command takes beyond its imports: python -m benchmarks.spectra

Every case runs in processes of its own, so that nothing is warm but the disk, and the fastest counts: what other
programs take away is not ours. Prints its part of BENCHMARKS.md, and writes that unless --dry-run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

import timm_nonlocal  # noqa: F401
from benchmarks.document import render
from benchmarks.spectra_report import report
from train.records.runs import ROOT, surroundings

TIMED = """
import json, sys, time
from timm_nonlocal.analysis import recorder
from timm_nonlocal.inspect import plots
from timm_nonlocal.inspect import main
start = time.perf_counter()
code = main([*sys.argv[1:], '--json', '-q', '-o', '{output}'])
print(json.dumps([code, time.perf_counter() - start]))
"""


def seconds(targets: list[Path], folder: Path, repeats: int) -> float:
    """The fastest of some processes that inspect all targets, without their imports."""
    command = [sys.executable, '-c', TIMED.format(output=folder / 'out.json'), *map(str, targets)]
    taken = []
    for _ in range(repeats):
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True,
                                env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'})
        code, time = json.loads(result.stdout)
        if code:
            raise RuntimeError(f'inspect ends with {code}: {result.stderr}')
        taken.append(time)
    return min(taken)


def package_files(folder: Path) -> tuple[list[Path], str]:
    """The weights in the package; while there are none, fresh ones of every nonlocal network it would hold."""
    shipped = sorted(path for path in (ROOT / 'timm_nonlocal' / 'weights').glob('*.safetensors') if '_nl_' in path.name)
    if shipped:
        return shipped, f'the {len(shipped)} checkpoints in the package'
    names = [f'{name}.{tag}' for name in timm.list_models('preresnet*_nl_*') for tag in ('cifar10', 'cifar100')]
    for name in names:
        save_file(timm.create_model(name).state_dict(), folder / f'{name}.safetensors')
    return [folder / f'{name}.safetensors' for name in names], f'all {len(names)} nonlocal networks, fresh weights'


def rows(repeats: int) -> list[dict[str, Any]]:
    """What, the goal in seconds where there is one, and the seconds it took."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files, what = package_files(folder)
        found: list[dict[str, Any]] = [{'what': what, 'goal': 2.0, 'seconds': seconds(files, folder, repeats)}]
        torch.manual_seed(0)
        for channels, inner in ((2048, 256), (1024, 512), (64, 32)):
            path = folder / 'one.safetensors'
            save_file({'block.g.weight': torch.randn(inner, channels), 'block.z.weight': torch.randn(channels, inner)},
                      path)
            goal = 0.2 if (channels, inner) == (2048, 256) else None
            found.append({'what': f"one block, C = {channels}, C' = {inner}", 'goal': goal,
                          'seconds': seconds([path], folder, repeats)})
        return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--dry-run', action='store_true', help='write nothing')
    args = parser.parse_args(argv)
    where = surroundings(torch.device('cpu'))
    record = {**where, 'rows': rows(args.repeats)}
    print(report({where['device']: record}))
    if not args.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, 'spectra.json')
            path.write_text(json.dumps({where['device']: record}))
            render('spectra', [path])
    return 0


if __name__ == '__main__':
    sys.exit(main())
