"""What every nonlocal block of a network has learned, from its weights, and on request on images.

    python -m timm_nonlocal.inspect TARGET… [--stability] [--data-dir DIR] [--json] [--plot FILE] [--check EXPR]

Exit codes, the highest of all targets: 0 done; 1 a --check failed, or weights or features are not finite; 2 the
arguments are off; 3 a target cannot be found or read; 4 it has no nonlocal block; 5 an unsafe pickle is refused; 6 the
Hub cannot be reached or does not let us in.
"""

import argparse
import fnmatch
import math
import os
import sys
import traceback
from itertools import groupby
from pathlib import Path
from typing import Any, Optional

import timm
from torch import nn

from .. import __version__
from ..analysis.spectra import BN_EPS, TOP, measure, weights
from ..analysis.stability import stability
from ..checkpoints.layouts import find, near, parse_key_map
from ..checkpoints.targets import Options, Source, near_names, open_target
from ..checkpoints.tensorfile import CheckpointError
from . import pictures, report
from .checks import OF_STABILITY, parse_check, run_checks
from .report import Result, Stage

EXAMPLES = """examples:
  python -m timm_nonlocal.inspect runs/preresnet20_nl_proposed_k5.cifar10.seed0 --plot spectrum.svg
  python -m timm_nonlocal.inspect user/repo@v1 model.safetensors checkpoint.pth --json
  python -m timm_nonlocal.inspect DIR --stability --data-dir data
  python -m timm_nonlocal.inspect DIR --check 'neg_top<=4' --check 'alignment>0.2' -q"""


def parse(argv: Optional[list[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m timm_nonlocal.inspect', description=__doc__.split('\n\n')[0], allow_abbrev=False,
        epilog=__doc__.split('\n\n')[2] + '\n' + EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    shown.add_argument('--layout', choices=['grid', 'overlay'], default='grid', help='a panel a block, or a target')
    shown.add_argument('--share-y', action=argparse.BooleanOptionalAction, default=True)
    shown.add_argument('--dpi', type=int, default=150)
    args = parser.parse_args(argv)
    try:
        args.checks = [parse_check(expression) for expression in args.check]
        if args.key_map:
            parse_key_map(args.key_map)
    except ValueError as error:
        parser.error(str(error))
    if (args.top is not None and args.top < 1) or args.num_images < 1 or args.timeout <= 0 or args.dpi < 1:
        parser.error('--top, --num-images, --timeout and --dpi must be above 0')
    if args.bn_eps < 0:
        parser.error(f'--bn-eps {args.bn_eps}: it is added to a variance, 0 or above')
    if args.plot is not None and Path(args.plot).suffix not in ('.png', '.svg', '.pdf'):
        parser.error(f'--plot {args.plot}: name a file that ends in .png, .svg or .pdf')
    if args.mu_max is not None and not 0 < args.mu_max <= 2:
        parser.error(f'--mu-max {args.mu_max}: the eigenvalues of I - A lie between 0 and 2')
    args.stability |= bool(args.mu_max or args.data_dir or args.images)
    if not args.stability and any(name in OF_STABILITY for name, _, _ in args.checks):
        parser.error('a --check of the stability needs --stability')
    return args


def examine(target: str, args: argparse.Namespace) -> Result:
    """Opens one target and measures its blocks. Raises CheckpointError."""
    source = open_target(target, Options(args.revision, args.file, args.token, args.offline, args.remote,
                                         args.allow_pickle, args.timeout, args.key_map))
    found = find(source.tensors.shapes, parse_key_map(args.key_map) if args.key_map else None)
    blocks = [block for block in found.blocks
              if (args.stage is None or fnmatch.fnmatchcase(block.stage, args.stage))
              and args.block in (None, block.index)]
    result = Result(target, source, warnings=found.warnings)
    if not blocks:
        return _nothing(result, len(found.blocks))
    if args.list:
        for block in blocks:
            shape = source.tensors.shapes[block.w_g]
            print(f"{target}\t{block.name or '(root)'}\t{block.formulation}\tC = {shape[1]}, C' = {shape[0]}\t"
                  f'{block.naming}\t{" ".join(name for name in block.keys.values() if name)}')
        return result
    tensors = source.tensors.read([name for block in blocks for name in block.names])
    for name, group in groupby(blocks, key=lambda block: block.stage):
        group = list(group)
        records = [measure(block, tensors, args.top, args.fold_bn, args.bn_eps) for block in group]
        if not source.trained:
            records = [record.with_flag('untrained') for record in records]
        stage = Stage(name, records[0].formulation, records)
        if any('nonfinite' in record.flags for record in records):
            result.code = 1
            result.warnings.append(f'{name}: the weights are not finite')
        elif args.stability and stage.formulation != 'unknown':
            factors = []
            for block in group:
                w_z, w_g, factor = weights(block, tensors, args.bn_eps)
                factors.append((factor[:, None] * w_z if args.fold_bn else w_z, w_g))
            try:
                each, stage.stability = stability(factors, stage.formulation, group[0].symmetric, args.mu_max)
                stage.blocks = [record.with_stability(own) for record, own in zip(records, each, strict=True)]
            except OverflowError as error:
                result.code = 1
                result.warnings.append(f'{name}: {error}')
        elif args.stability:
            result.warnings.append(f'{name}: the names do not tell eq. (1) from eq. (8), so that it has no kappa')
        result.stages.append(stage)
    if args.data_dir or args.images:
        _watch(result, args)
    return result


def _nothing(result: Result, left_out: int) -> Result:
    shapes = result.source.tensors.shapes
    pairs = '; '.join(f'{g} with {z}' for g, z in near(shapes))
    result.error = f'{result.source.label} has no nonlocal block ' + (
        f'of the {left_out} it has that --stage and --block let through' if left_out else
        f'among its {len(shapes)} tensors that a known naming fits') + (
        f'; the nearest pairs of transposed shapes are {pairs}: name them with --key-map'
        if pairs and not left_out else '')
    result.code = 4
    return result


def build(source: Source, arch: Optional[str]) -> nn.Module:
    """The network that a target's weights belong to, with them, in eval mode. Raises CheckpointError."""
    name = arch or source.architecture
    try:
        if source.kind == 'dir' and not arch and name:
            return timm.create_model(f'local-dir:{Path(source.file).parent}', pretrained=True).eval()
        if source.kind == 'hub' and not arch and not name:
            return timm.create_model(f'hf-hub:{source.repo.id}@{source.repo.commit or source.repo.revision or "main"}',
                                     pretrained=True).eval()
        if not name:
            raise CheckpointError(f'{source.input} does not say which network it belongs to: name it with --arch')
        if not timm.is_model(name.partition('.')[0]):
            raise CheckpointError(f'--arch {name}: no such registered name.{near_names(name)}')
        model = timm.create_model(source.input if not arch and source.kind == 'model' else name)
        model.load_state_dict(source.tensors.read(source.tensors.shapes))
        return model.eval()
    except (RuntimeError, TypeError, ValueError, OSError, KeyError) as error:
        raise CheckpointError(f'{source.input}: the network cannot be built: '
                              f'{" ".join(str(error).split())[:300]}') from error


def _finite(value: Any) -> bool:
    """Whether all numbers inside dicts and lists are finite."""
    if isinstance(value, (dict, list)):
        return all(map(_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def _watch(result: Result, args: argparse.Namespace) -> None:
    from ..analysis import recorder

    model = build(result.source, args.arch)
    try:
        images, labels = (pictures.cifar(args.data_dir, model.num_classes, args.num_images) if args.data_dir
                          else pictures.folder(args.images, model, args.num_images))
    except ValueError as error:
        raise CheckpointError(str(error)) from error

    def tick(done: int, total: int) -> None:
        if sys.stderr.isatty() and not args.quiet:
            print(f'\r{done} of {total} images', end='\r', file=sys.stderr, flush=True)

    try:
        result.images = recorder.watch(model, images, labels, tick)
    except RuntimeError as error:  # such as images of another form than the network takes
        raise CheckpointError(f'{result.source.input}: the network does not take these images: '
                              f'{" ".join(str(error).split())[:300]}') from error
    if not _finite(result.images):
        result.code, result.images = 1, None
        result.warnings.append('the features of the images are not finite, so they are not shown')
        return
    measured = result.images.pop('parts')
    for stage in result.stages:
        stage.images = measured.get(stage.name)
        if stage.images is None:
            result.warnings.append(f'{stage.name}: no block of this package, so it is not watched on images')


def render(args: argparse.Namespace, results: list[Result], checks: list[dict[str, Any]]) -> str:
    shown = [result for result in results if result.stages]
    if args.format == 'json':
        return report.to_json(results, checks, __version__)
    if args.format == 'csv':
        return report.to_csv(shown)
    if args.format == 'markdown':
        return report.markdown(shown)
    color = args.color == 'always' or (args.color == 'auto' and not args.output and sys.stdout.isatty()
                                       and not os.environ.get('NO_COLOR'))
    tables = [report.table(result, color) for result in shown]
    return '\n\n'.join([*tables, *([report.legend(shown)] if shown and not args.quiet else [])])


def main(argv: Optional[list[str]] = None) -> int:
    args = parse(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='replace')  # a terminal without Greek letters is no reason to stop
    results = []
    for target in args.targets:
        try:
            result = examine(target, args)
        except (CheckpointError, ValueError) as error:
            if args.verbose:
                traceback.print_exc()
            result = Result(target, error=str(error), code=getattr(error, 'code', 3))
        results.append(result)
        if result.error:
            print(f'error: {result.error}', file=sys.stderr)
        for warning in result.warnings if not args.quiet else ():
            print(f'note: {warning}', file=sys.stderr)
    code = max(result.code for result in results)
    if args.list:
        return code
    checks = run_checks(args.check, results)
    for check in checks:
        for failure in check['failures']:
            print(f'check failed: {check["expression"]}: {failure["target"]}, {failure["stage"]} {failure["block"]} '
                  f'has {failure["value"]}', file=sys.stderr)
    code = max(code, *(0 if check['ok'] else 1 for check in checks)) if checks else code
    return max(code, show(args, results, render(args, results, checks)))


def show(args: argparse.Namespace, results: list[Result], text: str) -> int:
    """Prints or writes the text, and draws. Returns 0, or 2 where the arguments do not allow it."""
    code = 0
    try:
        if args.output:
            beside = Path(args.output).with_name(f'.part.{Path(args.output).name}')
            beside.write_text(text + '\n', encoding='utf-8')
            beside.replace(args.output)
        elif text:
            print(text, flush=True)
    except BrokenPipeError:  # such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f'error: --output {args.output}: {error.strerror}', file=sys.stderr)
        code = 2
    if args.plot and any(result.stages for result in results):
        from . import plots
        try:
            plots.plot(args.plot, results, args.layout == 'overlay', args.share_y, args.dpi)
        except ModuleNotFoundError:
            print("error: --plot needs matplotlib: pip install 'timm_nonlocal[plot]'", file=sys.stderr)
            code = 2
        except (OSError, ValueError) as error:
            print(f'error: --plot {args.plot}: {error}', file=sys.stderr)
            code = 2
    return code

