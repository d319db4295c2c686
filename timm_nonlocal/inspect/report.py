"""How spectra are shown as text: a table, markdown, csv, JSON."""

import csv
import io
import json
from dataclasses import dataclass, field
from typing import Any

import huggingface_hub
import torch
from torch import Tensor

from ..analysis.spectra import Spectrum
from ..checkpoints.targets import Source

__all__ = ['PICTURES', 'PLACES', 'Result', 'Seen', 'Stage', 'legend', 'markdown', 'number', 'printable', 'table',
           'to_csv', 'to_json']

SCHEMA = 'timm_nonlocal.inspect/1'
ROUNDING = 1e-9  # of norms in float64
PLACES = [(0.5, 0.5), (0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75)]  # down and right in a picture
PICTURES = 3  # that a page shows
BLUE, RED, PLAIN = '\033[34m', '\033[31m', '\033[0m'

COLUMNS = [  # heading, width, field, format
    ('min', 9, 'lambda_min', '.4f'), ('max', 9, 'lambda_max', '.4f'), ('trace', 9, 'trace', '.4f'),
    ('align', 6, 'alignment', '.2f'), ('neg-en', 6, 'neg_energy', '.3f'), ('||W||_2', 8, 'spectral_norm', '.4f'),
    ('s-rank', 6, 'stable_rank', '.1f'), ('e-rank', 6, 'effective_rank', '.1f'), ('henrici', 7, 'nonnormality', '.3f'),
]
READING = {
    'original': 'original, Z + A Z Wᵀ: negative eigenvalues damp what A keeps, the smooth part first; positive ones '
                'amplify it',
    'proposed': 'proposed, Z + (A Z - Z) Wᵀ: positive eigenvalues diffuse, the rough part first; negative ones amplify '
                'it;\n         constants stay',
    'unknown': 'unknown: the names do not tell eq. (1) from eq. (8), in which signs mean the opposite',
}
LEGEND = """\
-/+      signs of the top eigenvalues of (W + Wᵀ)/2 by magnitude; over all, exactly C' are negative and C' positive in
         any weights in general position: compare with random weights, on each stage's line
align    tr W / (‖W_Z‖ ‖W_g‖): -1 for W = -BᵀB, +1 for W = BᵀB, 0 ± 1/√(C C') for random weights
neg-en   share of Σλ² in the negative eigenvalues, 0.5 for random weights
s-rank, e-rank, henrici   ‖W‖²_F/‖W‖²₂, exp entropy of the singular values, ‖WWᵀ-WᵀW‖/‖W‖²_F (0: normal)"""
STABILITY_LEGEND = """\
kappa    the most that a step with a frozen A can amplify Z; 1 is stable. For A of a symmetric kernel with eigenvalues
         above 1 - mu_max; of an A that was measured it is exact
outside  eigenvalues of W that break the CFL condition; radius: the asymptotic growth a step"""


def printable(text: str, kept: str = '') -> str:
    """Text whose characters that steer a terminal, or hide, are written out: names come from files of strangers.

    Example:
        >>> printable('a\\x1b[31m\\n')
        'a\\\\x1b[31m\\\\n'
    """
    return ''.join(letter if letter.isprintable() or letter in kept else letter.encode('unicode_escape').decode()
                   for letter in text)


@dataclass
class Stage:
    """The blocks of one nonlocal module, and what was asked of it as a whole."""

    name: str
    formulation: str
    blocks: list[Spectrum]
    stability: dict[str, Any] | None = None
    images: dict[str, Any] | None = None


@dataclass
class Seen:
    """Pictures, (N, H, W, 3) uint8, and by stage the rows of every A at `PLACES`, (N, P, h, w) on the stage's grid."""

    pixels: Tensor
    rows: dict[str, list[Tensor]]


@dataclass
class Result:
    """What came of one target; `listed` has the lines of --list."""

    input: str
    source: Source | None = None
    stages: list[Stage] = field(default_factory=list)
    listed: list[str] = field(default_factory=list)
    images: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)
    error: str | None = None
    code: int = 0
    mapped: bool = False
    seen: Seen | None = None

    @property
    def label(self) -> str:
        """What was read, or what was asked for where nothing could be."""
        return printable(self.source.label if self.source else self.input)

    def to_dict(self) -> dict[str, Any]:
        source, repo = self.source, self.source and self.source.repo
        return {
            'input': self.input, 'kind': source and source.kind, 'repo_id': repo and repo.id,
            'revision': repo and repo.revision, 'commit': repo and repo.commit,
            'file': source and source.file, 'sha256': repo and repo.sha256,
            'format': source and source.format, 'architecture': source and source.architecture,
            'trained': source and source.trained,
            'io': source and {'mode': source.tensors.mode, 'bytes_read': source.tensors.bytes_read,
                              'bytes_total': source.tensors.bytes_total},
            'stages': [{
                'name': stage.name, 'formulation': stage.formulation, 'stability': stage.stability,
                'images': stage.images, 'blocks': [block.to_dict() for block in stage.blocks],
            } for stage in self.stages],
            'images': self.images, 'warnings': self.warnings, 'error': self.error,
        }


def to_json(results: list[Result], checks: list[dict[str, Any]], version: str) -> str:
    """Everything, as docs/inspect-schema.md describes it; the same bytes for the same input."""
    text = json.dumps({
        'schema': SCHEMA,
        'tool': {'version': version, 'torch': torch.__version__, 'huggingface_hub': huggingface_hub.__version__},
        'targets': [result.to_dict() for result in results], 'checks': checks,
    }, indent=2, allow_nan=False, ensure_ascii=False)
    return ''.join(letter if letter.isprintable() or letter == '\n' else json.dumps(letter)[1:-1] for letter in text)


def to_csv(results: list[Result]) -> str:
    """One row a block, every number of `Spectrum` and of its stability a column."""
    rows = []
    for result in results:
        for stage in result.stages:
            for block in stage.blocks:
                record = block.to_dict()
                extra, raw = record.pop('stability') or {}, record.pop('raw')
                record |= {'raw_alignment': raw and raw['alignment'], 'raw_neg_top': raw and raw['neg_top'],
                           'eigenvalues': ' '.join(map(repr, record['eigenvalues'])),
                           'flags': ' '.join(record['flags']), 'keys': ' '.join(filter(None, block.keys.values())),
                           **{name: extra.get(name) for name in ('kappa', 'constant_gain', 'radius', 'outside')}}
                rows.append({key: printable(value) if isinstance(value, str) else value
                             for key, value in {'target': result.input, **record}.items()})
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue().rstrip('\n')


def number(value: float | None, form: str) -> str:
    """As every text shows it; - where it is undefined."""
    if value is None:
        return '-'
    if form == '.4f' and value and not 1e-3 <= abs(value) < 1e4:
        form = '.2e'  # neither digits that say nothing nor a row of zeros
    return format(value, form)


def _heading(stage: Stage) -> tuple[str, str]:
    """Of the column of counts, and what random weights show in it."""
    for block in stage.blocks:
        if block.neg_top_null is not None:
            counted = round(2 * block.neg_top_null)  # zeros among a block's own are not
            return f'top {counted} -/+', (
                f'; random weights: {block.neg_top_null:.1f} ± {block.neg_top_null_sd:.1f} of {counted} negative')
    return 'top -/+', ''


def _title(stage: Stage) -> str:
    first = stage.blocks[0]
    folded = ', gain and BN folded' if first.folded and first.naming.startswith('biggan') else ', BN folded'
    return (f"{printable(stage.name) or '(root)'}: {stage.formulation}, C = {first.C}, C' = {first.C_inner}"
            f'{folded if first.folded else ""}'
            f'{", stable by construction" if _stable(stage) else ""}')


def _stable(stage: Stage) -> bool:
    return all('stable' in block.flags for block in stage.blocks)


def table(result: Result, color: bool = False) -> str:
    """A line a block under a line a stage, then what was asked of the stage."""
    lines = [result.label]
    for stage in result.stages:
        counts, expected = _heading(stage)
        lines += ['', _title(stage) + expected,
                  f'{"block":>5}  {counts:>10}' + ''.join(
                      f' {heading:>{width}}' for heading, width, _, _ in COLUMNS)]
        for block in stage.blocks:
            counts = '-' if block.neg_top is None else f'{block.neg_top}/{block.pos_top:>2}'
            counts = f'{counts:>10}'
            if color and block.neg_top is not None and block.neg_top_null is not None and block.neg_top_null_sd:
                away = (block.neg_top - block.neg_top_null) / block.neg_top_null_sd
                counts = f'{BLUE if away > 0 else RED}{counts}{PLAIN}' if abs(away) > 3 else counts
            lines.append(f'{block.index:>5}  {counts}' + ''.join(
                f' {number(getattr(block, name), form):>{width}}' for _, width, name, form in COLUMNS)
                + (f'  {", ".join(block.flags)}' if block.flags else ''))
        lines += _stability(stage, stage.stability) if stage.stability else []
        lines += _inside(stage.images) if stage.images else []
        if stage.images and result.images and _stable(stage):
            lines += _rise(stage.images, result.images['images'])
    lines += _predictions(result.images) if result.images else []
    return '\n'.join(lines)


def legend(results: list[Result]) -> str:
    """What the numbers mean, for the formulations that are shown."""
    kinds = dict.fromkeys(stage.formulation for result in results for stage in result.stages)
    lines = [LEGEND, *([STABILITY_LEGEND] if any(stage.stability for result in results for stage in result.stages)
                       else []), *(READING[kind] for kind in kinds)]
    return '\n'.join(lines)


def _stability(stage: Stage, whole: dict[str, Any]) -> list[str]:
    basis = {'given': '', 'bound': ', a bound for Gaussian kernels as φ = θ',
             'assumed': ', assumed: θ and φ differ, or the names do not tell; exact with images'}[whole['mu_basis']]
    lines = [f'  stability for mu_max = {whole["mu_max"]:g}{basis}',
             f'{"block":>5}  {"kappa":>10} {"radius":>9} {"outside":>9} {"|I+W|":>9}']
    for block in stage.blocks:
        found = block.stability
        if found:
            outside = f'{found["outside"]}/{len(found["eigenvalues"])}'
            kappa, radius, gain = (number(found[name], '.4f') for name in ('kappa', 'radius', 'constant_gain'))
            lines.append(f'{block.index:>5}  {kappa:>10} {radius:>9} {outside:>9} {gain:>9}')
    return [*lines, f'  all in a row: kappa = {number(whole["kappa"], ".4f")} at mu = {whole["at_mu"]:.3f}']


def _inside(found: dict[str, Any]) -> list[str]:
    lines = []
    if found['markov']:
        chain = found['markov']
        lines += [f'  A on images: a row looks at {chain["neighbours"]:.1f} positions (entropy {chain["entropy"]:.3f} '
                  f'nats), |lambda_2| = {chain["second"]:.4f}, mu_max = {found["mu_max"]:.4f},',
                  f'  reversibility defect {chain["reversibility"]:.2e}, diagonal {chain["diagonal"]:.2e}, '
                  f'||A||_F^2 = {chain["hilbert_schmidt"]:.3f}, row sums off by {chain["row_sum_error"]:.1e}']
    elif not found['is_markov']:
        lines.append('  A on images is no Markov matrix: energies with equal weights, no kappa')
    lines.append(f'{"after":>5}  {"dirichlet":>10} {"variance":>9} {"power":>9} {"kappa":>9}')
    for n, values in enumerate(zip(found['dirichlet'], found['variance'], found['power'], strict=True)):
        kappa = found['kappa'][n - 1] if n and found['kappa'] else None
        lines.append(f'{n:>5}  {number(values[0], ".4g"):>10} {number(values[1], ".4g"):>9} '
                     f'{number(values[2], ".4g"):>9} {number(kappa, ".4f"):>9}')
    if found['kappa_stage'] is not None:
        lines.append(f'  all in a row: kappa = {number(found["kappa_stage"], ".4f")} for the A measured')
    elif found['markov']:
        lines.append('  no kappa: at some position the stationary distribution of A is next to 0')
    return lines


def _rise(found: dict[str, Any], count: int) -> list[str]:
    """Whether what a stable stage is built for was seen to hold, with an A for which it is."""
    rise = found['growth'] - 1
    return [] if not found['is_markov'] else [
        f'  ‖Zⁿ‖_π never rose on {count} images' if rise <= ROUNDING else
        f'  ‖Zⁿ‖_π rose on {count} images, in one block by up to {number(100 * rise, ".4f")} %']


def _predictions(images: dict[str, Any]) -> list[str]:
    lines = ['', f'predictions on {images["images"]} images (eigenvalues of A on {images["spectral_images"]})',
             f'{"A":>10} {"accuracy %":>11} {"unchanged %":>12}']
    for name in ('learned', 'uniform', 'identity'):
        accuracy = images['accuracy'] and images['accuracy'][name]
        lines.append(f'{name:>10} {number(accuracy, ".2f"):>11} '
                     f'{number(images["agreement"].get(name, 100.0), ".2f"):>12}')
    return lines


def markdown(results: list[Result]) -> str:
    """Tables to paste into a model card or an issue."""
    lines = []
    for result in results:
        lines += [f'**{result.label}**', '']
        for stage in result.stages:
            counts, expected = _heading(stage)
            lines += [_title(stage) + expected, '',
                      '| ' + ' | '.join(['block', counts, *(column[0].replace('||', '‖')
                                                                             for column in COLUMNS), 'kappa']) + ' |',
                      '| ---: ' * (len(COLUMNS) + 3) + '|']
            for block in stage.blocks:
                counts = '-' if block.neg_top is None else f'{block.neg_top}/{block.pos_top}'
                cells = [str(block.index), counts, *(number(getattr(block, name), form)
                                                     for _, _, name, form in COLUMNS),
                         number((block.stability or {}).get('kappa'), '.4f')]
                lines.append('| ' + ' | '.join(cells) + ' |')
            lines.append('')
    return '\n'.join(lines).rstrip()
