"""What a container's limit leaves, and who is asked before a matrix is made."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from timm_nonlocal import NonlocalBlock, NonlocalStage
from timm_nonlocal.layers import memory

GIB = 1 << 30


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Writes this process's line of /proc/self/cgroup and a group's files: limit, use and droppable files."""
    monkeypatch.setattr(memory, 'CGROUPS', tmp_path / 'cgroup')
    monkeypatch.setattr(memory, 'OWN_GROUPS', tmp_path / 'own')

    def write(own: str, **groups: tuple[object, int, int]) -> None:
        (tmp_path / 'own').write_text(f'5:cpu,cpuacct:/elsewhere\n{own}\n')
        limit, usage, dropped = memory.LIMITS[2 if own.startswith('0:') else 1]
        for name, (most, used, inactive) in groups.items():
            folder = tmp_path / 'cgroup' / ('' if own.startswith('0:') else 'memory') / name.replace('root', '')
            folder.mkdir(parents=True, exist_ok=True)
            (folder / limit).write_text(f'{most}\n')
            (folder / usage).write_text(f'{used}\n')
            (folder / 'memory.stat').write_text(f'anon 7\n{dropped} {inactive}\n')

    return write


@pytest.mark.parametrize(('own', 'files', 'left'), [
    ('0::/', dict(root=(4 * GIB, 3 * GIB, GIB)), 2 * GIB),
    ('0::/', dict(root=('max', 3 * GIB, GIB)), float('inf')),
    ('0::/', dict(root=(GIB, 2 * GIB, 0)), 0),
    ('0::/job', dict(job=('max', 0, 0), root=(3 * GIB, GIB, 0)), 2 * GIB),
    ('0::/job', dict(job=(2 * GIB, GIB, 0), root=(9 * GIB, GIB, 0)), GIB),
    ('4:memory:/docker/0a', dict(root=(4 * GIB, GIB, 0)), 3 * GIB),
    ('4:memory:/job', dict(job=(2 * GIB, GIB, GIB), root=(2 ** 63 - 4096, 0, 0)), 2 * GIB),
    ('4:memory:/job', {}, float('inf')),
])
def test_limits_of_containers(groups: Callable[..., None], own: str, files: dict[str, tuple[Any, int, int]],
                              left: float) -> None:
    groups(own, **files)
    assert memory.left_in_container() == left
    assert memory.available(torch.device('cpu')) <= left


def test_without_groups(groups: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.left_in_container() == float('inf')  # no such file, as outside Linux


def test_a_containers_limit_refuses(groups: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """K and A of 1,024 positions take 8 MiB an image in float32."""
    monkeypatch.setattr(memory, 'ASKED_FROM', 0)
    module, x = NonlocalStage(8, 2, merged=False), torch.randn(2, 8, 32, 32)
    groups('0::/', root=(GIB, GIB - (16 << 20), 0))
    module(x)
    groups('0::/', root=(GIB, GIB - (16 << 20) + 1, 0))
    with pytest.raises(torch.OutOfMemoryError, match='out of memory'):
        module(x)


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, 'ASKED_FROM', 0)
    monkeypatch.setattr(memory, 'available', lambda device: 4 << 20)


@pytest.mark.parametrize('make', [NonlocalStage, NonlocalBlock])
def test_refused_with_changed_children_and_transforms(little_memory: None,
                                                      make: type[NonlocalBlock] | type[NonlocalStage]) -> None:
    """Where the formulas stand in for the operator, the matrix is asked for as with merged=False."""
    module, x = make(8), torch.randn(1, 8, 32, 32)
    module(x)
    with pytest.raises(torch.OutOfMemoryError, match='bias-free nn.Linear without hooks and no transform'):
        torch.func.grad(lambda z: module(z).sum())(x)
    small = torch.randn(5, 1, 8, 16, 16)  # 0.5 MiB each
    torch.vmap(module)(small)
    with pytest.raises(torch.OutOfMemoryError, match='for a batch of 10, and'):
        torch.vmap(module)(small.repeat(2, 1, 1, 1, 1))
    module.theta.register_forward_hook(lambda *_: None)
    with pytest.raises(torch.OutOfMemoryError, match='out of memory'):
        module(x)


def test_who_is_not_asked(little_memory: None) -> None:
    """Graphs of tensor operators alone, as README.md says; one of `torch.fx` asks."""
    module, x = NonlocalStage(8, 2, affinity='concatenation').eval(), torch.randn(1, 8, 32, 32)
    for graph in (torch.jit.script(module), torch.jit.trace(module, x, check_trace=False),
                  torch.export.export(module, (x,)).module(),
                  torch.compile(module, backend='eager', fullgraph=True)):
        assert graph(x).shape == x.shape
    with pytest.raises(torch.OutOfMemoryError):
        torch.fx.symbolic_trace(module)(x)
