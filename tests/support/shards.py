"""A state dict in several files with an index of them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def in_shards(state: dict[str, Tensor], folder: Path, index: str, count: int = 3) -> list[Path]:
    """Writes them: the tensors in turn, by name; `index` is called as one of safetensors or of pickles is."""
    suffix, names = ('bin' if '.bin.' in index else 'safetensors'), sorted(state)
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {name: f'{position % count}.{suffix}' for position, name in enumerate(names)}
    for number in range(count):
        tensors = {name: state[name] for name in names[number::count]}
        path = folder / f'{number}.{suffix}'
        torch.save(tensors, path) if suffix == 'bin' else save_file(tensors, path)
    (folder / index).write_text(json.dumps({'metadata': {'total_size': 1}, 'weight_map': weight_map}))
    return [folder / index, *(folder / f'{number}.{suffix}' for number in range(count))]
