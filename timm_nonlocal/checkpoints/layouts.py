"""Which tensors of a state dict make a nonlocal block, told by their names and shapes alone.

A block has W_g, (C', C), and W_Z, (C, C'), as matrices or 1×1 convolutions of any dimension, side by side under one
prefix. The known namings:

    timm_nonlocal   <stage>.sub_blocks.<n>.g, .z, or g, z beside theta     this package
    timm            g, z, norm beside t, p                                 timm.layers.NonLocalAttn
    mmcv            g[.0].conv, conv_out.conv, conv_out.bn                 mmcv.cnn.NonLocal{1,2,3}d
    slowfast        conv_g, conv_out, norm                                 SlowFast, PyTorchVideo
    alexhex7        g[.0], W[.0], W.1                                      AlexHex7/Non-local_pytorch
    tea1528         g[.0], W_z[.0], W_z.1                                  tea1528/Non-Local-NN-Pytorch
    biggan          g, o, a scalar gamma                                   SAGAN, BigGAN-PyTorch
    biggan-hf       snconv1x1_g, snconv1x1_o_conv, a scalar gamma          pytorch-pretrained-biggan
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..layers.stable import BASE

__all__ = ['Block', 'Found', 'Shape', 'find', 'natural', 'near', 'parse_key_map']

Shape = tuple[int, ...]

MAX_CHANNELS = 16384  # a file that claims more is not read into memory

_WRAPPERS = re.compile(r'(?:module\.|_orig_mod\.)+')  # DistributedDataParallel and torch.compile
_HINT = re.compile(r'non_?local|att|theta|value|\b(?:nl|g|v)\b', re.IGNORECASE)
_WEIGHT = re.compile(r'(?P<module>.*?)\.?(?P<kind>weight|weight_orig|parametrizations\.weight\.original)')
_POWER = {  # the singular vectors that spectral normalisation keeps beside a weight, by how the weight is stored
    'weight': ('u0',),
    'weight_orig': ('weight_u', 'weight_v'),
    'parametrizations.weight.original': ('parametrizations.weight.0._u', 'parametrizations.weight.0._v'),
}


@dataclass(frozen=True)
class Layout:
    """Module names, relative to the block: alternatives for W_g and W_Z, and what may or must stand beside them."""

    name: str
    g: tuple[str, ...]
    z: tuple[str, ...]
    norm: tuple[str, ...] = ()
    scale: str = ''
    needs: str = ''  # a module without which the naming is another one's


LAYOUTS = (
    Layout('timm', ('g',), ('z',), ('norm',), needs='t'),
    Layout('timm_nonlocal', ('g',), ('z',)),
    Layout('mmcv', ('g.conv', 'g.0.conv'), ('conv_out.conv',), ('conv_out.bn',)),
    Layout('slowfast', ('conv_g',), ('conv_out',), ('norm',)),
    Layout('alexhex7', ('g', 'g.0'), ('W', 'W.0'), ('W.1',)),
    Layout('tea1528', ('g', 'g.0'), ('W_z', 'W_z.0'), ('W_z.1',)),
    Layout('biggan', ('g',), ('o',), scale='gamma'),
    Layout('biggan-hf', ('snconv1x1_g',), ('snconv1x1_o_conv',), scale='gamma'),
)


@dataclass(frozen=True)
class Block:
    """Where one block's tensors are. Names are those of the state dict it was found in.

    Attributes:
        stage: the prefix of the nonlocal module, without the wrappers' prefixes.
        index: the block's number in it.
        name: the block's own prefix.
        naming: the layout's name, or 'key-map'.
        formulation: 'original' (eq. (1)), 'proposed' (eq. (8)), or 'unknown' (ours without θ: a control).
        symmetric: whether φ = θ; None where the names do not tell.
        w_g, w_z: (C', C[, 1…]) and (C, C'[, 1…]).
        power_g, power_z: vectors of spectral normalisation, to divide the weight by its largest singular value.
        norm: prefix of a batch norm after W_Z, with running statistics.
        scale: a number that multiplies the block's output.
        base: of the orthonormal W_g where the block is stable by construction (`layers.stable`); then w_g and w_z are
            what both are made from, (C', C) and (C', C').
    """

    stage: str
    index: int
    name: str
    naming: str
    formulation: str
    symmetric: bool | None
    w_g: str
    w_z: str
    power_g: tuple[str, ...] = ()
    power_z: tuple[str, ...] = ()
    norm: str | None = None
    scale: str | None = None
    base: str | None = None

    @property
    def names(self) -> list[str]:
        """Every tensor that the block's spectrum needs."""
        norm = [f'{self.norm}.{part}' for part in ('weight', 'running_var')] if self.norm else []
        return [self.w_g, self.w_z, *self.power_g, *self.power_z, *norm,
                *filter(None, (self.scale, self.base))]

    @property
    def keys(self) -> dict[str, str | None]:
        """The names as the JSON shows them."""
        return {'w_z': self.w_z, 'w_g': self.w_g, 'bn': self.norm, 'scale': self.scale}


@dataclass
class Found:
    """The blocks in natural order of their names, and what was looked at and left out, in words."""

    blocks: list[Block] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def find(shapes: Mapping[str, Shape | None], key_map: dict[str, re.Pattern] | None = None) -> Found:
    """The nonlocal blocks of a state dict.

    Args:
        shapes: the shape of every tensor by its name; None for a shape not known yet, which then fits.
        key_map: from `parse_key_map`: how blocks are named where no known layout fits.

    Example:
        >>> shapes = {'nl.theta.weight': (2, 4), 'nl.g.weight': (2, 4), 'nl.z.weight': (4, 2), 'fc.weight': (10, 4)}
        >>> [(block.name, block.naming, block.formulation, block.symmetric) for block in find(shapes).blocks]
        [('nl', 'timm_nonlocal', 'original', True)]
    """
    found = Found()
    names = {_WRAPPERS.sub('', name) if _WRAPPERS.match(name) else name: name for name in shapes}
    view = {name: shapes[original] for name, original in names.items()}
    seen = set()
    for block in [*(_mapped(view, key_map) if key_map else ()), *_known(view)]:
        if block.w_g in seen or (problem := _misfit(block, view)) is None:
            continue
        if problem:
            found.warnings.append(problem)
        else:
            seen.add(block.w_g)
            norm = block.norm
            if norm and not all(f'{norm}.{part}' in view for part in ('weight', 'running_var')):
                found.warnings.append(f'{norm} after {block.w_z} has no weight and running variance: not folded')
                norm = None
            found.blocks.append(_renamed(block, norm, names))
    found.blocks.sort(key=lambda block: (natural(block.stage), block.index))
    return found


def near(shapes: Mapping[str, Shape], most: int = 3) -> list[tuple[str, str]]:
    """Pairs of weights under one prefix whose shapes are each other's transpose: what a `key_map` might name."""
    groups: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        if len(shape) >= 2 and set(shape[2:]) <= {1} and shape[0] != shape[1] and name.count('.'):
            groups.setdefault(name.rsplit('.', 2)[0] if name.count('.') > 1 else '', []).append(name)
    pairs = [(g, z) for names in groups.values() for g in names for z in names
             if shapes[g][0] < shapes[g][1] and shapes[g][:2] == shapes[z][1::-1]]
    return sorted(pairs, key=lambda pair: not _HINT.search(pair[0]))[:most]


def parse_key_map(text: str) -> dict[str, re.Pattern]:
    r"""'g=REGEX,z=REGEX[,bn=REGEX][,scale=REGEX]' as patterns.

    Each is searched in the names; the two (or more) of a block are those with the same text left over, as in
    r'g=\.v\.weight,z=\.proj_out\.weight'. `bn` finds the norm's weight.

    Raises:
        ValueError: another form, or an expression that does not compile.
    """
    pieces = re.split(r',(?=(?:g|z|bn|scale)=)', text)
    pairs = dict(piece.partition('=')[::2] for piece in pieces)
    if not {'g', 'z'} <= pairs.keys() <= {'g', 'z', 'bn', 'scale'} or len(pairs) != len(pieces):
        raise ValueError(f'{text!r}: write g=REGEX,z=REGEX, with bn=REGEX and scale=REGEX where there are such')
    try:
        return {role: re.compile(expression) for role, expression in pairs.items()}
    except re.error as error:
        raise ValueError(f'{text!r}: {error.pattern!r} is not a regular expression: {error}') from error


def natural(name: str) -> list[tuple[int, Any]]:
    """A sort key in which layer10 follows layer9."""
    return [(1, int(part)) if part.isdigit() else (0, part) for part in re.split(r'(\d+)', name)]


def _join(*parts: str) -> str:
    return '.'.join(part for part in parts if part)


def _known(view: Mapping[str, Shape | None]) -> Iterator[Block]:
    modules = {}  # the name of every module with a weight, and how it is stored
    for name in view:
        if match := _WEIGHT.fullmatch(name):
            modules[match['module']] = match['kind']
    for module in modules:
        for layout in LAYOUTS:
            for g in layout.g:
                if module != g and not module.endswith('.' + g):
                    continue
                prefix = module[:-len(g)].rstrip('.')
                z = next((_join(prefix, z) for z in layout.z if _join(prefix, z) in modules), None)
                scale = _join(prefix, layout.scale) if layout.scale else None
                if not z or (layout.needs and _join(prefix, layout.needs) not in modules):
                    continue
                if scale and (scale not in view or view[scale] not in ((), (1,), (1, 1, 1, 1), None)):
                    continue
                norm = next((_join(prefix, norm) for norm in layout.norm
                             if {_join(prefix, norm, part) for part in ('weight', 'running_var')} & view.keys()), None)
                yield _block(layout, prefix, module, z, modules=modules, view=view, norm=norm, scale=scale)


def _block(layout: Layout, prefix: str, g: str, z: str, modules: Mapping[str, str],
           view: Mapping[str, Shape | None], **optional: str | None) -> Block:
    stage, index, formulation = prefix, 0, 'original'
    symmetric: bool | None = None
    if layout.name == 'timm_nonlocal':
        match = re.fullmatch(r'(?:(?P<stage>.*)\.)?sub_blocks\.(?P<index>\d+)', prefix)
        if match:
            stage, index = match['stage'] or '', int(match['index'])
        formulation = ('original' if _join(prefix, 'theta') in modules else
                       'proposed' if match and _join(stage, 'theta') in modules else 'unknown')
        if formulation != 'unknown':
            symmetric = _join(prefix if formulation == 'original' else stage, 'phi') not in modules

    def power(module: str) -> tuple[str, ...]:
        return tuple(name for vector in _POWER[modules[module]] if (name := _join(module, vector)) in view)

    base = _join(g, BASE)
    return Block(stage=stage, index=index, name=prefix, naming=layout.name, formulation=formulation,
                 symmetric=symmetric, w_g=_join(g, modules[g]), w_z=_join(z, modules[z]), power_g=power(g),
                 power_z=power(z), base=base if base in view else None, **optional)


def _mapped(view: Mapping[str, Shape | None], key_map: dict[str, re.Pattern]) -> Iterator[Block]:
    rests: dict[str, dict[str, str]] = {role: {} for role in ('g', 'z', 'bn', 'scale')}
    for role, pattern in key_map.items():
        for name in view:
            if match := pattern.search(name):
                rests[role].setdefault(name[:match.start()] + name[match.end():], name)
    for rest, g in rests['g'].items():
        if z := rests['z'].get(rest):
            norm = rests['bn'].get(rest)
            yield Block(stage=rest, index=0, name=rest, naming='key-map', formulation='original', symmetric=None,
                        w_g=g, w_z=z, norm=norm and norm.removesuffix('.weight'), scale=rests['scale'].get(rest))


def _misfit(block: Block, view: Mapping[str, Shape | None]) -> str | None:
    """'' where the shapes fit, words where they do not, None where nothing says that a block was meant."""
    g, z = view[block.w_g], view[block.w_z]
    if g is None or z is None:
        return ''
    pair = f'{block.w_g} {g} and {block.w_z} {z}'
    if len(g) < 2 or len(z) < 2 or 0 in g:
        return None
    if {*g[2:], *z[2:]} - {1}:
        return f'{pair}: not 1×1 kernels, so that the block has no single W = W_Z W_g: left out'
    if max(*g[:2], *z[:2]) > MAX_CHANNELS:
        return f'{pair}: more than {MAX_CHANNELS} channels: left out'
    if block.base:
        return '' if (view[block.base], z) == ((g[1], g[1]), (g[0], g[0])) else f'{pair}: no stable block: left out'
    if g[1::-1] != z[:2]:
        return f'{pair}: W_Z has not the shape of W_g\'s transpose: left out'
    return ''


def _renamed(block: Block, norm: str | None, names: Mapping[str, str]) -> Block:
    """The block with the state dict's own names, wrappers included."""
    return replace(
        block, w_g=names[block.w_g], w_z=names[block.w_z],
        power_g=tuple(names[name] for name in block.power_g), power_z=tuple(names[name] for name in block.power_z),
        norm=norm and names[f'{norm}.weight'].removesuffix('.weight'),  # a prefix is no name itself
        scale=block.scale and names[block.scale], base=block.base and names[block.base])
