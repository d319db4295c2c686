"""The inspect command: opens its targets, measures their blocks, and shows what it found."""

import argparse
import errno
import fnmatch
import math
import os
import shlex
import sys
import traceback
from itertools import groupby
from pathlib import Path
from typing import Any

from .. import __version__, files
from ..analysis.spectra import block_weights, measure
from ..analysis.stability import stability
from ..checkpoints.layouts import find, near, parse_key_map
from ..checkpoints.targets import Options, Source, open_target
from ..checkpoints.tensorfile import CheckpointError
from . import pictures, report
from .checks import run_checks
from .network import build, formulation
from .options import parse
from .report import Result, Seen, Stage, printable

__all__ = ['main']


def examine(target: str, args: argparse.Namespace) -> Result:
    """Opens one target and measures its blocks. Raises CheckpointError."""
    source = open_target(target, Options(
        revision=args.revision, file=args.file, token=args.token, offline=args.offline, remote=args.remote,
        allow_pickle=args.allow_pickle, timeout=args.timeout, key_map=args.key_map))
    found = find(source.tensors.shapes, parse_key_map(args.key_map) if args.key_map else None)
    blocks = [block for block in found.blocks
              if (args.stage is None or fnmatch.fnmatchcase(block.stage, args.stage))
              and args.block in (None, block.index)]
    result = Result(target, source, warnings=[*source.notes, *found.warnings])
    result.mapped = any(block.naming == 'key-map' for block in found.blocks)
    if not blocks:
        result.code, result.error = 4, _nothing(source, len(found.blocks), args.key_map)
        return result
    if any(block.formulation == 'unknown' for block in blocks):
        kind = formulation(source, args.arch)
        blocks = [block.told(kind) for block in blocks]
    if args.list:
        for block in blocks:
            shape = source.tensors.shapes[block.w_g]
            result.listed.append('\t'.join(map(printable, (
                target, block.name or '(root)', block.formulation, f"C = {shape[1]}, C' = {shape[0]}", block.naming,
                ' '.join(filter(None, block.keys.values()))))))
        return result
    tensors = source.tensors.read([name for block in blocks for name in block.names])
    for name, members in groupby(blocks, key=lambda block: block.stage):
        group = list(members)
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
                w_z, w_g, factor = block_weights(block, tensors, args.bn_eps)
                factors.append((factor[:, None] * w_z if args.fold_bn else w_z, w_g))
            try:
                each, stage.stability = stability(factors, stage.formulation, group[0].symmetric, args.mu_max)
                stage.blocks = [record.with_stability(own) for record, own in zip(records, each, strict=True)]
            except OverflowError as error:
                result.code = 1
                result.warnings.append(f'{name}: {error}')
        elif args.stability:
            result.warnings.append(f'{name}: the names do not tell eq. (1) from eq. (8), so that it has no kappa: '
                                   f'name the network with --arch')
        result.stages.append(stage)
    if args.data_dir or args.images:
        _watch(result, source, args)
    return result


def _nothing(source: Source, left_out: int, key_map: str | None) -> str:
    """Why no block is measured, `left_out` of them because of the options."""
    if left_out:
        return (f'{source.label} has no nonlocal block of the {left_out} it has that --stage and --block let '
                f'through')
    shapes = source.tensors.shapes
    if key_map:
        matched = ', '.join(f'{sum(bool(pattern.search(name)) for name in shapes)} names for {role}'
                            for role, pattern in parse_key_map(key_map).items())
        return (f'{source.label} has no nonlocal block: --key-map matches {matched} of its {len(shapes)} tensors, and '
                f'no two with the same text left over and the shapes of W_g and W_Z')
    pairs = '; '.join(f'{g} with {z}' for g, z in near(shapes))
    return (f'{source.label} has no nonlocal block among its {len(shapes)} tensors that a known naming fits'
            + (f'; the nearest pairs of transposed shapes are {pairs}: name them with --key-map' if pairs else ''))


def _finite(value: Any) -> bool:
    """Whether all numbers inside dicts and lists are finite."""
    if isinstance(value, (dict, list)):
        return all(map(_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def _watch(result: Result, source: Source, args: argparse.Namespace) -> None:
    from ..analysis import recorder

    model: Any = build(source, args.arch)  # timm's, with num_classes
    try:
        images, labels = (pictures.cifar(args.data_dir, model, args.num_images) if args.data_dir
                          else pictures.folder(args.images, model, args.num_images))
    except ValueError as error:
        raise CheckpointError(str(error)) from error

    def tick(done: int, total: int) -> None:
        if sys.stderr.isatty() and not args.quiet:
            print(f'\r{done} of {total} images', end='\r', file=sys.stderr, flush=True)

    try:
        result.images = recorder.watch(model, images, labels, tick)
    except RuntimeError as error:  # such as images of another form than the network takes
        raise CheckpointError(f'{source.input}: the network does not take these images: '
                              f'{" ".join(str(error).split())[:300]}') from error
    if not _finite(result.images):
        result.code, result.images = 1, None
        result.warnings.append('the features of the images are not finite, so they are not shown')
        return
    measured = result.images.pop('modules')
    if args.html:
        few = images[:report.PICTURES]
        result.seen = Seen(pictures.pixels(few, model, args.data_dir), recorder.rows(model, few, report.PLACES))
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


def _say(text: str) -> None:
    print(printable(' '.join(text.split())), file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; gives its exit code (`options` lists them)."""
    args = parse(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='replace')  # a terminal without Greek letters is no reason to stop
    results = []
    for target in args.targets:
        try:
            result = examine(target, args)
        except Exception as error:  # whatever a stranger's file makes of it, the other targets are shown
            if args.verbose:
                print(printable(traceback.format_exc(), '\n'), end='', file=sys.stderr)
            kind = '' if isinstance(error, (CheckpointError, ValueError)) else f'{type(error).__name__}: '
            result = Result(target, error=f'{"" if target in str(error) else f"{target}: "}{kind}{error}',
                            code=error.code if isinstance(error, CheckpointError) else 3)
        results.append(result)
        if result.error:
            _say(f'error: {result.error}')
        for warning in result.warnings if not args.quiet else ():
            _say(f'note: {warning}')
    code = max(result.code for result in results)
    if args.key_map and not any(result.mapped or result.error for result in results):
        _say(f'error: --key-map {args.key_map} matches no block of any target')
        code = max(code, 4)
    if args.list:
        return max(code, show(args, '\n'.join(line for result in results for line in result.listed)))
    checks = run_checks(args.check, results)
    for check in checks:
        for failure in check['failures']:
            _say(f'check failed: {check["expression"]}: {failure["target"]}, {failure["stage"]} {failure["block"]} '
                 f'has {failure["value"]}')
    code = max(code, *(0 if check['ok'] else 1 for check in checks)) if checks else code
    shown = show(args, render(args, results, checks))
    if any(result.stages for result in results):
        command = f'python -m timm_nonlocal.inspect {shlex.join(sys.argv[1:] if argv is None else argv)}'
        shown = max(shown, draw(args, results, checks, command))
    return max(code, shown)


def _in_a_folder(name: str) -> Path:
    """The path of a file to write. Raises FileNotFoundError where its folder is not there: it may be misspelt."""
    path = Path(name)
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, 'No such folder', str(path.parent))
    return path


def show(args: argparse.Namespace, text: str) -> int:
    """Prints or writes the text, if there is any. Returns 0, or 2 where it cannot be written."""
    try:
        if text and args.output:
            files.write_text(_in_a_folder(args.output), text + '\n')
        elif text:
            print(text, flush=True)
    except BrokenPipeError:  # such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        _say(f'error: {f"--output {args.output}" if args.output else "standard output"}: {error.strerror}')
        return 2
    return 0


def draw(args: argparse.Namespace, results: list[Result], checks: list[dict[str, Any]], command: str) -> int:
    """Writes the picture and the page that are asked for. Returns 0, or 2 where one cannot be written."""
    def picture(path: Path) -> None:
        from . import plots
        plots.plot(path, results, overlay=args.layout == 'overlay', share_y=args.share_y, dpi=args.dpi)

    def whole(path: Path) -> None:
        from . import page
        page.write(path, results, checks, command)

    code = 0
    for flag, name, write in (('--plot', args.plot, picture), ('--html', args.html, whole)):
        try:
            if name:
                write(_in_a_folder(name))
        except ModuleNotFoundError:
            _say(f"error: {flag} needs matplotlib: pip install 'timm_nonlocal[plot]'")
            code = 2
        except (OSError, ValueError) as error:
            _say(f'error: {flag} {name}: {error}')
            code = 2
    return code
