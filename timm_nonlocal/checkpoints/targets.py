"""Where weights come from: a registered name, a folder, a file, the Hub. Names and shapes first, tensors on demand."""

import difflib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import timm
import torch
from huggingface_hub import constants
from timm.models import get_pretrained_cfg, split_model_name_tag
from torch import Tensor

from .layouts import find, parse_key_map
from .pickled import InMemory, load_pickle
from .remote import Repo
from .tensorfile import CheckpointError, LocalFile, ShardedFile, TensorFile

__all__ = ['InMemory', 'Options', 'Source', 'load_pickle', 'near_names', 'open_target']

REVISION = r'refs/pr/\d+|refs/convert/\w+|[^/?]+'  # the Hub's own names may stand as they are
PICKLES = ('.pth', '.pt', '.bin', '.ckpt', '.tar', '.pkl')


@dataclass
class Options:
    """What decides how a target is opened; the command's flags of the same names."""

    revision: str | None = None
    file: str | None = None
    token: Any = None
    offline: bool = False
    remote: str = 'auto'
    allow_pickle: bool = False
    timeout: float = 10.0
    key_map: str | None = None

    def needs(self, names: list[str]) -> set[str]:
        """Of all names of a checkpoint those that its nonlocal blocks may need."""
        found = find(dict.fromkeys(names), parse_key_map(self.key_map) if self.key_map else None)
        kind = [name for name in names if {'theta', 'phi'} & {*name.split('.')}] if found.blocks else []
        return {*kind, *(name for block in found.blocks for name in block.names),
                *(name for tensors in found.unread.values() for name in tensors)}


@dataclass
class Source:
    """An opened target.

    Attributes:
        input: the target as given.
        kind: 'hub', 'dir', 'file' or 'model' (freshly initialised).
        file: the weights' file.
        tensors: names and shapes, read on demand.
        format: 'safetensors', 'pickle' or 'module'.
        trained: False for freshly initialised weights.
        architecture: the registered name, where the target tells it.
        repo: where it is on the Hub.
    """

    input: str
    kind: str
    file: str | None
    tensors: TensorFile
    format: str = 'safetensors'
    trained: bool = True
    architecture: str | None = None
    repo: Repo | None = None

    @property
    def notes(self) -> list[str]:
        """What was read where there was a choice, in words."""
        return getattr(self.tensors, 'notes', [])

    @property
    def label(self) -> str:
        """One line that says what was read, and how much of it."""
        if self.kind == 'model':
            return f'{self.input} (untrained: freshly initialised)'
        if not self.repo:
            return self.input if self.file in (self.input, None) else f'{self.input}  {Path(self.file).name}'
        total = f' of {_bytes(self.tensors.bytes_total)}' if self.tensors.bytes_total else ''
        return (f'{self.repo.id} @ {(self.repo.commit or self.repo.revision or "main")[:8]}  {self.file}  '
                f'{self.tensors.mode}: {_bytes(self.tensors.bytes_read)}{total}')

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors, those of shards without a block too. Raises CheckpointError."""
        return self.tensors.read(self.tensors.weight_map if isinstance(self.tensors, ShardedFile)
                                 else self.tensors.shapes)


def near_names(name: str) -> str:
    """' Did you mean …?' with the registered architectures nearest to name, or ''."""
    near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.6)
    return f' Did you mean {", ".join(near)}?' if near else ''


def open_target(target: str, options: Options | None = None) -> Source:
    """Finds a target and reads the names and shapes of its tensors.

    Args:
        target: in this order: `hf-hub:`, `hf_hub:`, `hf://` or the Hub's https address of a repository, or of a folder
            or file in it; `local-dir:` and a folder; a file; a folder; `user/repo[@rev]` on the Hub; a registered timm
            name, with or without tag (its own weights where it has some, else freshly initialised ones).

    Raises:
        CheckpointError: nothing of the kind is there, or it cannot be read.
        UnsafePickleError: it is a pickle that holds more than tensors, or one on the Hub that nobody allowed.
        HubError: the Hub cannot be reached, or does not let us in.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({'g.weight': torch.ones(2, 4)}, f'{folder}/model.safetensors')
        ...     source = open_target(folder)
        ...     source.kind, source.tensors.shapes, source.tensors.read(['g.weight'])['g.weight'].sum().item()
        ('dir', {'g.weight': (2, 4)}, 8.0)
    """
    options = options or Options()
    if match := re.fullmatch(r'(?:hf[-_]hub:|hf://)(.*)', target):
        return _hub(target, match[1], options)
    if match := re.fullmatch(rf'(?:https://huggingface\.co|{re.escape(constants.ENDPOINT)})/([^/]+/[^/?]+)(?:/(tree|'
                             rf'resolve|blob)/({REVISION})(?:/([^?]+))?)?/?(?:\?.*)?', target):
        revision, place = (unquote(part or '').strip('/') for part in match.groups()[2:])
        options = replace(options, revision=options.revision or revision or None)
        if match[2] != 'tree':
            options = replace(options, file=options.file or place or None)
        return _hub(target, match[1], options, folder=place if match[2] == 'tree' else '')
    path = Path(target.removeprefix('local-dir:'))
    if path.is_file() and path.name.endswith('.index.json'):
        return _folder(target, path.parent, replace(options, file=path.name))
    if path.is_file():
        return _file(target, path)
    if path.is_dir():
        return _folder(target, path, options)
    slashes = target.partition('@')[0].count('/')  # those of a branch apart
    if target.startswith('local-dir:') or ('/' in target and slashes != 1) or _is_weights(path):
        raise CheckpointError(f'{target}: no such file or folder')
    if '/' in target:
        try:
            return _hub(target, target, options)
        except CheckpointError as error:
            error.args = (f'{error}; here is no such file or folder',)
            raise
    return _registered(target, options)


def _is_weights(path: Path) -> bool:
    return path.suffix in ('.safetensors', *PICKLES)


def _bytes(count: int) -> str:
    for size, unit in ((10 ** 9, 'GB'), (10 ** 6, 'MB'), (10 ** 3, 'kB')):
        if count >= size:
            return f'{count / size:.1f} {unit}' if count < 100 * size else f'{count / size:.0f} {unit}'
    return f'{count} B'


def _hub(target: str, name: str, options: Options, architecture: str | None = None, folder: str = '') -> Source:
    name, _, revision = name.partition('@')
    repo = Repo(name.strip('/'), options.revision or unquote(revision) or None, token=options.token,
                offline=options.offline, remote=options.remote, allow_pickle=options.allow_pickle,
                timeout=options.timeout)
    tensors, file = repo.open(options.file, options.needs, load_pickle, folder)
    if isinstance(tensors, ShardedFile):
        repo.sha256 = None  # it would be one shard's
    form = 'pickle' if isinstance(tensors, InMemory) else _format(file)
    return Source(target, 'hub', file, tensors, form, architecture=architecture, repo=repo)


def _folder(target: str, path: Path, options: Options) -> Source:
    names = [options.file] if options.file else ['model.safetensors', *sorted(
        found.name for found in path.glob('*.safetensors.index.json')), 'pytorch_model.bin',
        'pytorch_model.bin.index.json']
    file = next((path / name for name in names if (path / name).is_file()), None)
    if file is None:
        there = sorted(found.name for found in path.iterdir() if _is_weights(found))
        raise CheckpointError(f'{path} holds no {options.file or "model.safetensors"}' + (
            f'; name one of its files with --file: {", ".join(there[:5])}' if there else ''))
    architecture = _architecture(path / 'config.json')
    if not file.name.endswith('.index.json'):
        source = _file(target, file)
        return Source(target, 'dir', str(file), source.tensors, source.format, architecture=architecture)
    tensors = ShardedFile(str(file), file.read_text(errors='replace'), options.needs,
                          lambda shard: _file(target, file.parent / shard).tensors)
    return Source(target, 'dir', str(file), tensors, _format(file.name), architecture=architecture)


def _format(file: str) -> str:
    """That of the shards of an index, or of a safetensors file."""
    return 'pickle' if file.endswith('.bin.index.json') else 'safetensors'


def _architecture(config: Path) -> str | None:
    """The registered name in a timm config.json; nothing else in it is looked at."""
    try:
        name = json.loads(config.read_text())['architecture']
        return name if isinstance(name, str) and timm.is_model(name) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _file(target: str, path: Path) -> Source:
    try:
        with open(path, 'rb') as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f'{path} cannot be read: {error.strerror}') from error
    if path.suffix != '.safetensors' and (start[:2] in (b'PK', b'\x80\x02', b'\x80\x04') or start[8:] != b'{'):
        return Source(target, 'file', str(path), load_pickle(path), 'pickle')
    return Source(target, 'file', str(path), LocalFile(path))


def _registered(target: str, options: Options) -> Source:
    architecture, _tag = split_model_name_tag(target)
    if not timm.is_model(architecture):
        raise CheckpointError(f'{target}: no such file, folder or registered name.{near_names(architecture)}')
    try:
        cfg = get_pretrained_cfg(target, allow_unregistered=False)
    except RuntimeError as error:  # timm's own word for a tag it does not know
        raise CheckpointError(f'{target}: {error}') from error
    if cfg and cfg.file:
        source = _file(target, Path(cfg.file))
        return Source(target, 'file', cfg.file, source.tensors, source.format, architecture=architecture)
    if cfg and cfg.has_weights and cfg.hf_hub_id and not _of_another(cfg.hf_hub_id, architecture):
        file = options.file or cfg.hf_hub_filename
        repo_id = cfg.hf_hub_id if cfg.hf_hub_id.count('/') and not cfg.hf_hub_id.endswith('/') else f'timm/{target}'
        return _hub(target, repo_id, replace(options, file=file), architecture)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = timm.create_model(target, pretrained=False)
        except RuntimeError as error:
            raise CheckpointError(f'{target}: {error}') from error
    return Source(target, 'model', None, InMemory(model.state_dict()), 'module', trained=False,
                  architecture=architecture)


def _of_another(repo_id: str, architecture: str) -> bool:
    """Whether a repository is named after another network: a backbone's weights, which hold no nonlocal module."""
    name = repo_id.rpartition('/')[2].partition('.')[0]
    return name != architecture and timm.is_model(name)
