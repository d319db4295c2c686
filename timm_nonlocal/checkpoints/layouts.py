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

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .blocks import Block, Found, Shape
from .names import unwrapped
from .stored import STABLE, Stored

__all__ = ['Block', 'Found', 'Shape', 'find', 'natural', 'near', 'parse_key_map']

MAX_CHANNELS = 16384  # a file that claims more is not read into memory

_SUB_BLOCK = re.compile(r'(?:(?P<stage>.*)\.)?sub_blocks\.(?P<index>\d+)')
_TENSOR = re.compile(r'\.(?:parametrizations\.weight\.original1?|weight(?:_orig|_bar|_v)?)$')  # of a layer's weight
_HINT = re.compile(r'non_?local|att|theta|value|\b(?:nl|g|v)\b', re.IGNORECASE)


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
_ROLES = {'theta', 'phi', *(name.rpartition('.')[2] for layout in LAYOUTS for name in (
    *layout.g, *layout.z, *layout.norm, layout.needs))}


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
    clean = unwrapped(shapes)
    names = {name: original for original, name in clean.items()}
    view = {name: shapes[original] for name, original in names.items()}
    layers = _layers(view, lambda layer: layer.rpartition('.')[2] in _ROLES)
    seen = set()
    for block in [*(_mapped(view, names, key_map) if key_map else ()), *_known(view, layers)]:
        if block.w_g in seen:
            continue
        if strange := _strange(block):
            seen.add(block.w_g)
            for weight in strange:
                _leave_out(found, weight, names, 'what weight {} make is not known: store the weight itself, adapters '
                                                 'merged into it')
            continue
        if (problem := _misfit(block, view)) is None:
            continue
        if problem:
            found.warnings.append(problem)
        else:
            seen.add(block.w_g)
            norm = block.norm
            if norm and (why := _unfoldable(norm, view[block.w_z], view)):
                found.warnings.append(f'{norm} after {block.w_z} has {why}: not folded')
                norm = None
            found.blocks.append(_renamed(block, norm, names))
    for layer, weight in layers.items():
        prefix, _, role = layer.rpartition('.')
        if role == 'z' and _ours(prefix, layers) and _join(prefix, 'g') not in layers:
            _leave_out(found, weight, names, '{} has no W_g beside it; it may have been dropped as one that is shared')
    found.blocks.sort(key=lambda block: (natural(block.stage), block.index))
    return found


def near(shapes: Mapping[str, Shape], most: int = 3) -> list[tuple[str, str]]:
    """Pairs of weights under one prefix whose shapes are each other's transpose: what a `key_map` might name."""
    groups: dict[tuple[str, Shape], list[str]] = {}
    for name, shape in shapes.items():
        if len(shape) >= 2 and set(shape[2:]) <= {1} and shape[0] != shape[1] and name.count('.'):
            groups.setdefault((name.rsplit('.', 2)[0] if name.count('.') > 1 else '', shape[:2]), []).append(name)
    pairs = [(g, z) for (prefix, shape), names in groups.items() if shape[0] < shape[1]
             for g in names for z in groups.get((prefix, shape[::-1]), ())[:most]]
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


def _layers(view: Iterable[str], wanted: Callable[[str], bool]) -> dict[str, Stored]:
    """The layers that are wanted by name, and how their weights are stored."""
    below: dict[str, list[str]] = {}
    for name in view:
        for dot in (place for place, letter in enumerate(name) if letter == '.'):
            if wanted(layer := name[:dot]):
                below.setdefault(layer, []).append(name[dot + 1:])
    return {layer: weight for layer, rests in below.items() if (weight := Stored.of(layer, rests)).names}


def _ours(prefix: str, layers: Mapping[str, Stored]) -> bool:
    """Whether a block of this package is meant, whatever its layers have become."""
    return bool(_SUB_BLOCK.fullmatch(prefix)) or _join(prefix, 'theta') in layers


def _known(view: Mapping[str, Shape | None], layers: Mapping[str, Stored]) -> Iterator[Block]:
    for layer in layers:
        for layout in LAYOUTS:
            for g in layout.g:
                if layer != g and not layer.endswith('.' + g):
                    continue
                prefix = layer[:-len(g)].rstrip('.')
                any_form = layout.name == 'timm_nonlocal' and _ours(prefix, layers)
                z = next((weight for z in layout.z if (weight := layers.get(_join(prefix, z)))
                          and (weight.hinted or any_form)), None)
                scale = _join(prefix, layout.scale) if layout.scale else None
                if not z or not (layers[layer].hinted or any_form):
                    continue
                if layout.needs and _join(prefix, layout.needs) not in layers:
                    continue
                if scale and (scale not in view or view[scale] not in ((), (1,), (1, 1, 1, 1), None)):
                    continue
                norm = next((_join(prefix, norm) for norm in layout.norm
                             if {_join(prefix, norm, part) for part in ('weight', 'running_var')} & view.keys()), None)
                yield _block(layout, prefix, layers[layer], z, layers, norm, scale)


def _block(layout: Layout, prefix: str, g: Stored, z: Stored, layers: Mapping[str, Stored], norm: str | None,
           scale: str | None) -> Block:
    stage, index, formulation = prefix, 0, 'original'
    symmetric: bool | None = None
    if layout.name == 'timm_nonlocal':
        match = _SUB_BLOCK.fullmatch(prefix)
        if match:
            stage, index = match['stage'] or '', int(match['index'])
        formulation = ('original' if _join(prefix, 'theta') in layers else
                       'proposed' if match and _join(stage, 'theta') in layers else 'unknown')
        if formulation != 'unknown':
            symmetric = _join(prefix if formulation == 'original' else stage, 'phi') not in layers
    return Block(stage=stage, index=index, name=prefix, naming=layout.name, formulation=formulation,
                 symmetric=symmetric, g=g, z=z, norm=norm, scale=scale)


def _mapped(view: Mapping[str, Shape | None], names: Mapping[str, str],
            key_map: dict[str, re.Pattern]) -> Iterator[Block]:
    rests: dict[str, dict[str, str]] = {role: {} for role in ('g', 'z', 'bn', 'scale')}
    for role, pattern in key_map.items():
        for name in view:
            if match := pattern.search(name) or pattern.search(names[name]):
                rests[role].setdefault(match.string[:match.start()] + match.string[match.end():], name)
    layers = _layers(view, {_TENSOR.sub('', name) for role in 'gz' for name in rests[role].values()}.__contains__)

    def stored(name: str) -> Stored:
        layer = _TENSOR.sub('', name)
        return Stored(name, (name,)) if layer == name else layers[layer]

    for rest, g in rests['g'].items():
        if z := rests['z'].get(rest):
            norm = rests['bn'].get(rest)
            yield Block(stage=rest, index=0, name=rest, naming='key-map', formulation='original', symmetric=None,
                        g=stored(g), z=stored(z), norm=norm and norm.removesuffix('.weight'),
                        scale=rests['scale'].get(rest))


def _strange(block: Block) -> list[Stored]:
    """The weights of a block that are stored in no known form."""
    pair = (block.g, block.z)
    if tuple(weight.form for weight in pair) == STABLE:
        return []
    return [weight for weight in pair if weight.form is None or weight.form in STABLE]


def _leave_out(found: Found, weight: Stored, names: Mapping[str, str], why: str) -> None:
    tensors = [names[name] for name in weight.names]
    found.unread[tensors[0].removesuffix(weight.names[0].removeprefix(weight.layer))] = tensors
    found.warnings.append(f'{why.format(", ".join(tensors[:4]))}: the block is left out')


def _misfit(block: Block, view: Mapping[str, Shape | None]) -> str | None:
    """'' where the shapes fit, words where they do not, None where nothing says that a block was meant."""
    g, z = view[block.w_g], view[block.w_z]
    if g is None or z is None:
        return ''
    pair = f'{block.w_g} {g} and {block.w_z} {z}'
    if len(g) < 2 or len(z) < 2 or 0 in g:
        return None if block.naming != 'timm_nonlocal' or block.formulation == 'unknown' else (
            f'{pair}: no matrices, as where each process holds a part: left out; gather the state dict first')
    if {*g[2:], *z[2:]} - {1}:
        return f'{pair}: not 1×1 kernels, so that the block has no single W = W_Z W_g: left out'
    if max(*g[:2], *z[:2]) > MAX_CHANNELS:
        return f'{pair}: more than {MAX_CHANNELS} channels: left out'
    for weight in (block.g, block.z):
        if not weight.fits(view):
            return f'{", ".join(weight.names)}: these shapes do not make one weight: left out'
    if block.basis:
        fits = (view[block.basis], z) == ((max(g),) * 2, (g[0],) * 2)
        return '' if fits else f'{pair}: no stable block: left out'
    if g[1::-1] != z[:2]:
        return f'{pair}: W_Z has not the shape of W_g\'s transpose: left out'
    if block.scale and (own := view[block.scale]) is not None and math.prod(own) not in (1, z[0]):
        return f'{pair}: {block.scale} {own} is neither one gain nor one a channel: left out'
    return ''


def _unfoldable(norm: str, z: Shape | None, view: Mapping[str, Shape | None]) -> str | None:
    """Why a batch norm after W_Z, of shape z, cannot be folded into it, in words."""
    parts = [f'{norm}.{part}' for part in ('weight', 'running_var')]
    if not all(part in view for part in parts):
        return 'no weight and running variance'
    if z and any(view[part] not in ((z[0],), None) for part in parts):
        return f'a weight {view[parts[0]]} and a running variance {view[parts[1]]}, not {z[0]} numbers each'
    return None


def _renamed(block: Block, norm: str | None, names: Mapping[str, str]) -> Block:
    """The block with the state dict's own names, wrappers included."""
    def own(weight: Stored) -> Stored:
        return replace(weight, names=tuple(names[name] for name in weight.names))

    return replace(
        block, g=own(block.g), z=own(block.z), scale=block.scale and names[block.scale],
        norm=norm and names[f'{norm}.weight'].removesuffix('.weight'))  # a prefix is no name itself
