"""What every nonlocal block of a network has learned, from its weights, and on request on images.

    python -m timm_nonlocal.inspect TARGET… [--stability] [--data-dir DIR] [--json] [--plot FILE] [--html FILE]

Exit codes, the highest of all targets: 0 done; 1 a --check failed, or weights or features are not finite; 2 the
arguments are off; 3 a target cannot be found or read; 4 it has no nonlocal block; 5 an unsafe pickle is refused; 6 the
Hub cannot be reached or does not let us in.
"""

import argparse
from math import inf
from pathlib import Path

from .. import __version__
from ..analysis.spectra import BN_EPS, TOP
from ..checkpoints.layouts import parse_key_map
from .checks import OF_STABILITY, parse_check

__all__ = ['parse']

EXAMPLES = """examples:
  python -m timm_nonlocal.inspect runs/preresnet20_nl_proposed_k5.cifar10.seed0 --plot spectrum.svg
  python -m timm_nonlocal.inspect user/repo@v1 model.safetensors checkpoint.pth --json
  python -m timm_nonlocal.inspect DIR preresnet20_nl_original_k3 --data-dir data --html page.html
  python -m timm_nonlocal.inspect DIR --check 'neg_top<=4' --check 'alignment>0.2' -q"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, checked as far as no target is needed; exits with 2 where they are off."""
    purpose, _, codes = __doc__.split('\n\n')
    parser = argparse.ArgumentParser(
        prog='python -m timm_nonlocal.inspect', description=purpose, allow_abbrev=False,
        epilog=f'{codes}\n{EXAMPLES}', formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('targets', nargs='+', metavar='TARGET',
                        help='a registered name, a folder, a file, or user/repo[@rev] on the Hub')
    parser.add_argument('--version', action='version', version=f'timm_nonlocal {__version__}')
    parser.add_argument('--verbose', action='store_true', help='tracebacks with errors')

    where = parser.add_argument_group('where weights come from')
    where.add_argument('--revision', metavar='REV', help='branch, tag or commit on the Hub')
    where.add_argument('--file', metavar='NAME', help='which file of a folder or repository')
    token = where.add_mutually_exclusive_group()
    token.add_argument('--token', action='store_const', const=True,
                       help='insist on the token that `hf auth login` keeps')
    token.add_argument('--no-token', dest='token', action='store_const', const=False, help='send none')
    where.add_argument('--offline', action='store_true', help="read the Hub's cache alone")
    where.add_argument('--remote', choices=['auto', 'range', 'download'], default='auto',
                       help='auto: the cache, then the needed bytes alone, then the whole file')
    where.add_argument('--allow-pickle', action='store_true',
                       help='fetch a pickle from the Hub; only tensors are ever loaded from one')
    where.add_argument('--timeout', type=float, default=10.0, metavar='SECONDS')
    where.add_argument('--key-map', metavar='g=REGEX,z=REGEX[,bn=REGEX][,scale=REGEX]',
                       help='how blocks are named where no known layout fits')

    what = parser.add_argument_group('what is measured')
    what.add_argument('--top', type=int, default=TOP, help=f'count signs among so many eigenvalues (default {TOP})')
    what.add_argument('--all', dest='top', action='store_const', const=None, help='count them among all')
    what.add_argument('--fold-bn', action=argparse.BooleanOptionalAction, default=True,
                      help='multiply a batch norm or gain after W_Z into it')
    what.add_argument('--bn-eps', type=float, default=BN_EPS)
    what.add_argument('--stage', metavar='GLOB', help='only stages with such a name')
    what.add_argument('--block', type=int, metavar='N', help='only the block with this number')
    what.add_argument('--stability', action='store_true', help='the CFL number kappa of every block and stage')
    what.add_argument('--mu-max', type=float, help='the largest eigenvalue of I - A (default 1)')
    images = what.add_mutually_exclusive_group()
    images.add_argument('--data-dir', metavar='DIR', help='also watch A and Z on CIFAR test images, kept there')
    images.add_argument('--images', metavar='DIR', help='the same on a folder of pictures')
    what.add_argument('--num-images', type=int, default=32, metavar='N')
    what.add_argument('--arch', metavar='NAME', help='the registered network that a bare file belongs to')

    shown = parser.add_argument_group('how it is shown')
    shown.add_argument('--format', choices=['table', 'json', 'csv', 'markdown'], default='table')
    shown.add_argument('--json', dest='format', action='store_const', const='json', help='the same as --format json')
    shown.add_argument('--list', action='store_true', help='name the blocks and read no weights')
    shown.add_argument('-q', '--quiet', action='store_true', help='no legend, no notes, no progress')
    shown.add_argument('-o', '--output', metavar='FILE', help='write there in place of printing')
    shown.add_argument('--color', choices=['auto', 'always', 'never'], default='auto')
    shown.add_argument('--check', action='append', default=[], metavar='EXPR',
                       help="such as 'neg_top<=4': exit with 1 unless it holds of every block")
    shown.add_argument('--plot', metavar='FILE', help='also draw: .png, .svg or .pdf')
    shown.add_argument('--html', metavar='FILE', help='also write one page that needs no network: table, spectra, '
                       'kappa, and with images what chosen positions attend to')
    shown.add_argument('--layout', choices=['grid', 'overlay'], default='grid', help='a panel a block, or a target')
    shown.add_argument('--share-y', action=argparse.BooleanOptionalAction, default=True)
    shown.add_argument('--dpi', type=int, default=150)
    args = parser.parse_args(argv)
    try:
        checked = [parse_check(expression)[0] for expression in args.check]
        if args.key_map:
            parse_key_map(args.key_map)
    except ValueError as error:
        parser.error(str(error))
    if (args.top is not None and args.top < 1) or args.num_images < 1 or args.dpi < 1 or not 0 < args.timeout < inf:
        parser.error('--top, --num-images, --timeout and --dpi must be above 0')
    if not 0 <= args.bn_eps < inf:
        parser.error(f'--bn-eps {args.bn_eps}: it is added to a variance, 0 or above')
    if args.plot is not None and Path(args.plot).suffix not in ('.png', '.svg', '.pdf'):
        parser.error(f'--plot {args.plot}: name a file that ends in .png, .svg or .pdf')
    if args.html is not None and Path(args.html).suffix not in ('.html', '.htm'):
        parser.error(f'--html {args.html}: name a file that ends in .html')
    if args.mu_max is not None and not 0 < args.mu_max <= 2:
        parser.error(f'--mu-max {args.mu_max}: the eigenvalues of I - A lie between 0 and 2')
    if args.list and (unread := [flag for flag, given in (
            ('--check', args.check), ('--plot', args.plot), ('--html', args.html), ('--format', args.format != 'table'),
            ('--output', args.output), ('--stability', args.stability), ('--mu-max', args.mu_max),
            ('--data-dir', args.data_dir), ('--images', args.images)) if given]):
        parser.error(f'--list names the blocks and reads no weights: leave {" and ".join(unread)} out')
    args.stability |= bool(args.mu_max or args.data_dir or args.images)
    if not args.stability and any(name in OF_STABILITY for name in checked):
        parser.error('a --check of the stability needs --stability')
    return args
