"""One page that stands alone: spectra, numbers, κ against the CFL disc, and what positions of pictures attend to."""

import base64
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import jinja2
import torch
from markupsafe import Markup, escape
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from .. import __version__, files
from ..analysis.spectra import Spectrum
from . import plots
from .report import COLUMNS, PLACES, READING, Result, Stage, number, printable

__all__ = ['html', 'write']

LARGEST = 192  # pixels a side of a picture that is shown
EXPLAINED = {  # field: heading, what it says
    'lambda_min': ('smallest λ', 'The most negative eigenvalue of (W + Wᵀ)/2.'),
    'lambda_max': ('largest λ', 'Its most positive eigenvalue.'),
    'trace': ('trace', 'The sum of all its eigenvalues, positive where the positive ones weigh more.'),
    'alignment': ('alignment', 'tr W over ‖W_Z‖‖W_g‖: −1 where W = −BᵀB, +1 where W = BᵀB, near 0 for random weights.'),
    'neg_energy': ('negative energy', 'The share of Σλ² that the negative eigenvalues hold; 0.5 for random weights.'),
    'spectral_norm': ('‖W‖₂', 'The most that W can stretch a vector.'),
    'stable_rank': ('stable rank', '‖W‖²_F over ‖W‖²₂: how many directions carry W’s weight.'),
    'effective_rank': ('effective rank',
                       'The same, less strict: the exponential of the entropy of W’s singular values.'),
    'nonnormality': ('non-normality', 'Henrici’s number: 0 where the eigenvectors of W are orthogonal.'),
}
STABILITY = {
    'kappa': ('κ', 'The most that one step with a frozen A can amplify the features; 1 is stable.'),
    'radius': ('radius', 'The growth a step in the long run, at least 1.'),
    'outside': ('outside', 'Eigenvalues of W that break the CFL condition.'),
    'constant_gain': ('‖I + W‖₂', 'The most that an original block can amplify constants.'),
}
FACTS = {'kind': 'kind', 'architecture': 'architecture', 'file': 'file', 'format': 'format', 'repo_id': 'repository',
         'revision': 'revision', 'commit': 'commit', 'sha256': 'sha256'}
BASIS = {'given': 'as given', 'bound': 'a bound for Gaussian kernels, as φ = θ',
         'assumed': 'assumed, as θ and φ differ or are not known; exact with images'}


@dataclass
class Part:
    """A stage of a target: what the page compares."""

    mark: str
    result: Result
    stage: Stage

    @property
    def name(self) -> str:
        return f"{self.mark} {self.stage.name or '(root)'}"

    @property
    def limit(self) -> float:
        """The largest |λ| of its blocks."""
        return max((abs(block.top[0]) for block in self.stage.blocks if block.top), default=0) or 1.0

    @property
    def reach(self) -> float:
        """A little more than the largest modulus of an eigenvalue of W."""
        values = [abs(complex(*value)) for block in self.stage.blocks if block.stability
                  for value in block.stability['eigenvalues'][:1]]
        return 1.15 * max(values, default=0) or 1.0


def write(path: Path, results: list[Result], checks: list[dict[str, Any]], command: str) -> None:
    """The page as a file; the same bytes for the same input.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    files.write_text(path, html(results, checks, command))


def html(results: list[Result], checks: list[dict[str, Any]], command: str) -> str:
    """The page: no script, and nothing that is fetched. Raises ModuleNotFoundError where matplotlib is not installed.

    Args:
        results: of every target.
        checks: from `checks.run_checks`.
        command: that made it.
    """
    targets = [(_mark(index), result) for index, result in enumerate(results)]
    parts = [Part(mark, result, stage) for mark, result in targets for stage in result.stages]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: printable(value, '\n') if type(value) is str else value)
    environment.filters |= {'signed': lambda text: text.replace('-', '−'), 'number': _number, 'id': id,
                            'formula': _formula}
    return environment.get_template('page.html.j2').render(
        targets=[(mark, result, _facts(result)) for mark, result in targets], parts=parts,
        groups=list(_groups(parts)), columns=COLUMNS, explained=EXPLAINED, stability=STABILITY, basis=BASIS,
        readings=[READING[kind] for kind in dict.fromkeys(part.stage.formulation for part in parts)],
        spectra={id(block): _spectrum(block, part.limit, f's{index}-{block.index}')
                 for index, part in enumerate(parts) for block in part.stage.blocks},
        planes={id(block): _plane(part, block, f'p{index}-{block.index}') for index, part in enumerate(parts)
                for block in part.stage.blocks if part.stage.stability and block.stability},
        energies={id(part): _energies(part.stage.images, f'e{index}') for index, part in enumerate(parts)
                  if part.stage.images},
        looks={id(part): looks for part in parts if (looks := list(_looks(part)))}, scale=_scale(),
        watched=any(result.images for result in results),
        kept='/'.join(map(str, sorted({block.top_k for part in parts for block in part.stage.blocks}))),
        checks=checks, command=command, versions={
            'timm_nonlocal': __version__, 'torch': torch.__version__, 'huggingface_hub': huggingface_hub.__version__})


def _mark(index: int) -> str:
    return chr(ord('A') + index) if index < 26 else str(index + 1)


def _groups(parts: list[Part]) -> Iterator[list[Part]]:
    """Parts whose blocks fit side by side into one table."""
    group: list[Part] = []
    for part in parts:
        if group and sum(len(each.stage.blocks) for each in [*group, part]) > 12:
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def _number(value: float | None, form: str) -> str:
    text = number(value, form).replace('-', '−') if value is not None else '–'
    return re.sub(r'(?<=e[+−])0+(?=\d)', '', text)


def _formula(text: str) -> Markup:
    """W_Z and the like with their indices below the line."""
    return Markup(re.sub(r'(?<=[Wμ²])_(Z|g|F|max)', r'<sub>\1</sub>', str(escape(text))))


def _facts(result: Result) -> dict[str, str]:
    """What the report says of where a target's weights came from."""
    document = result.to_dict()
    facts = {name: document[field] for field, name in FACTS.items() if document[field]}
    facts['trained'] = {True: '', False: 'no: freshly initialised', None: ''}[document['trained']]
    return {name: value for name, value in facts.items() if value and value != result.input}


def _spectrum(block: Spectrum, limit: float, name: str) -> Markup:
    return Markup(plots.drawing(lambda panel: plots.bars(panel, block, 1.08 * limit), 2.3, 1.5, name))


def _plane(part: Part, block: Spectrum, name: str) -> Markup:
    def draw(panel: Any) -> None:
        plots.plane(panel, part.stage, block)
        panel.set_aspect('equal', adjustable='box')
        panel.set_xlim(-part.reach, part.reach)
        panel.set_ylim(-part.reach, part.reach)

    return Markup(plots.drawing(draw, 2.1, 1.9, name))


def _energies(found: dict[str, Any], name: str) -> Markup:
    return Markup(plots.drawing(lambda panel: plots.energies(panel, found), 3.2, 2.0, name))


def _uri(pixels: Tensor) -> str:
    """(H, W, 3) uint8 as a PNG."""
    data = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(data, 'PNG')
    return f'data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}'


def _colors(share: Tensor) -> Tensor:
    """Numbers from 0 to 1 as colours, (..., 3), that tell by brightness alone."""
    import matplotlib

    return torch.from_numpy(matplotlib.colormaps['inferno'](share.numpy()))[..., :3]


def _scale() -> list[str]:
    return ['#' + ''.join(f'{round(255 * part):02x}' for part in color)
            for color in _colors(torch.linspace(0, 1, 9)).tolist()]


@dataclass
class Tile:
    """A picture under the row of A of one position."""

    uri: str
    peak: float  # over 1/M
    down: float  # of the position, in percent
    right: float


def _looks(part: Part) -> Iterator[list[tuple[str, list[Tile]]]]:
    """For every A of the stage, for every picture, the picture itself and a tile a position."""
    if seen := part.result.seen:
        pictures = [_small(picture) for picture in seen.pixels]
        for rows in seen.rows.get(part.stage.name, []):
            yield [(_uri(picture), [_tile(picture, row, place) for row, place in zip(each, PLACES, strict=True)])
                   for picture, each in zip(pictures, rows, strict=True)]


def _small(picture: Tensor) -> Tensor:
    image = Image.fromarray(picture.contiguous().numpy())
    image.thumbnail((LARGEST, LARGEST))
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


def _tile(picture: Tensor, row: Tensor, place: tuple[float, float]) -> Tile:
    """The picture, grey, under a row of A, (h, w), whose largest entry is the brightest."""
    share = row.clamp_min(0) / row.max().clamp_min(1e-300)
    share = interpolate(share[None, None], picture.shape[:2])[0, 0]
    grey = picture.double().div(255).mean(-1, keepdim=True)
    weight = 0.35 + 0.65 * share[..., None].sqrt()
    mixed = (1 - weight) * 0.8 * grey + weight * _colors(share)
    down, right = ((int(part * size) + 0.5) / size for part, size in zip(place, row.shape, strict=True))
    pixels = mixed.clamp(0, 1).mul(255).round().byte()
    return Tile(_uri(pixels), row.max().item() * row.numel(), 100 * down, 100 * right)
