"""The spectrum of every nonlocal block of a network, from its weights alone.

    python -m timm_nonlocal.inspect TARGET… [--json] [--plot FILE]

Exit codes: 0 done; 2 the arguments are off; 3 a target cannot be found or read; 4 it has no nonlocal block.
"""

import argparse
import sys

from . import report
from .checkpoint import CheckpointError, load
from .spectrum import spectra


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m timm_nonlocal.inspect', description=__doc__.split('\n\n')[0], allow_abbrev=False)
    parser.add_argument('targets', nargs='+', metavar='TARGET',
                        help='a registered name, a folder with model.safetensors, or a .safetensors file')
    parser.add_argument('--json', action='store_true', help='print JSON in place of tables')
    parser.add_argument('--plot', metavar='FILE', help='also draw the top eigenvalues: .png, .svg or .pdf')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    found, code = [], 0
    for target in args.targets:
        try:
            state_dict, source = load(target)
            blocks = spectra(state_dict)
        except (CheckpointError, ValueError) as error:
            print(f'error: {error}', file=sys.stderr)
            code = max(code, 3)
            continue
        if not blocks:
            print(f'error: {source} has no nonlocal block: none of its {len(state_dict)} tensors is named '
                  f'….sub_blocks.N.g.weight with a .z.weight beside it', file=sys.stderr)
            code = max(code, 4)
            continue
        found.append((target, source, blocks))
    if args.json:
        print(report.to_json(found))
    elif found:
        print('\n\n'.join(report.table(source, blocks) for _, source, blocks in found))
    if args.plot and found:
        try:
            report.plot(args.plot, found)
        except ModuleNotFoundError:
            print("error: --plot needs matplotlib: pip install 'timm_nonlocal[plot]'", file=sys.stderr)
            code = max(code, 2)
        except (OSError, ValueError) as error:
            print(f'error: --plot {args.plot}: {error}', file=sys.stderr)
            code = max(code, 2)
    return code


if __name__ == '__main__':
    sys.exit(main())
