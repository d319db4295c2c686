"""The kernels compile for a Hopper GPU, without one: tensor cores are used, and registers and shared memory suffice.

What they compute is tested in test_triton_backend.py.
"""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip('triton')

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from timm_nonlocal.ops import triton_kernels as kernels  # noqa: E402
from timm_nonlocal.ops.triton_backend import TILES  # noqa: E402

H100 = GPUTarget('cuda', 90, 32)
SHARED = 227 << 10  # bytes that a program may have there
CUOBJDUMP = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
IN_FLOAT32 = {'row_stats_ptr', 'delta_ptr'}
CLOSING = {'K': 5, 'HOLD': True}


def compiled(kernel: Any, tile: Any, width: int, even: bool, **constants: Any) -> Any:
    """A kernel for bfloat16, with the alignments that torch's tensors have."""
    own, step, warps, stages = tile
    constants |= dict(D=width, C=width, BLOCK_D=width, BLOCK_C=width, OWN=own, STEP=step, EVEN=even)
    float32 = IN_FLOAT32 | ({'dq_ptr'} if constants.get('ATOMIC') else set())

    def type_of(name: str) -> str:
        if name in constants:
            return 'constexpr'
        if name.endswith('_ptr'):
            return '*fp32' if name in float32 else '*bf16'
        return 'fp32' if name in ('scale', 'exponent') else 'i32'

    names = kernel.arg_names
    aligned = [i for i, name in enumerate(names) if name.endswith('_ptr') or name.startswith('ld_')]
    source = ASTSource(
        kernel, {name: type_of(name) for name in names},
        {(names.index(name),): value for name, value in constants.items() if name in names},
        {(i,): [['tt.divisibility', 16]] for i in aligned})
    return triton.compile(source, target=H100, options={
        'num_warps': warps, 'num_stages': stages, 'enable_fp_fusion': kernels.FUSION})


@pytest.mark.parametrize(('kernel', 'constants'), [
    (kernels.apply, dict(FIRST=True, LAST=False, PROPOSED=True)),
    (kernels.apply, dict(FIRST=False, LAST=False, PROPOSED=True)),
    (kernels.apply, dict(FIRST=True, LAST=True, PROPOSED=False)),
    (kernels.apply_transposed, dict(FIRST=False, LAST=False, PROPOSED=True)),
    (kernels.apply_transposed, dict(FIRST=True, LAST=True, PROPOSED=False)),
    (kernels.close_keys, dict(ATOMIC=True, **CLOSING)), (kernels.close_keys, dict(ATOMIC=False, **CLOSING)),
    (kernels.close_queries, CLOSING)],
    ids=['first', 'apply', 'original', 'transposed', 'original transposed', 'keys', 'keys, deterministic', 'queries'])
@pytest.mark.parametrize('even', [True, False], ids=['even', 'odd'])
def test_compiles_for_hopper(tmp_path: Path, kernel: Any, constants: dict[str, Any], even: bool) -> None:
    """The tile of the paper's networks (C' = 32), which is the first in the list."""
    binary = compiled(kernel, TILES[kernel][64][0], 32, even, **constants)
    assert 'wgmma.mma_async' in binary.asm['ptx'] and binary.metadata.shared <= SHARED
    path = tmp_path / 'kernel.cubin'
    path.write_bytes(binary.asm['cubin'])
    usage = subprocess.run([CUOBJDUMP, '-res-usage', path], capture_output=True, text=True, check=True).stdout
    assert re.search(r'REG:\d+ STACK:0 .*LOCAL:0 ', usage), usage  # no register is spilled


def test_exponents_are_rounded_before_their_maximum_is_taken_off() -> None:
    """As the interpreter does; fused with the product, huge ones gave NaN."""
    kernel, constants = kernels.apply, dict(FIRST=False, LAST=False, PROPOSED=True)
    ptx = compiled(kernel, TILES[kernel][64][0], 32, True, **constants).asm['ptx']
    assert 'ex2.approx' in ptx and 'fma.rn' not in ptx


@pytest.mark.parametrize('kernel', TILES, ids=lambda kernel: kernel.fn.__name__)
def test_some_tile_of_wide_blocks_fits(kernel: Any) -> None:
    """D = C' = 128, two sub-blocks."""
    constants = dict(K=2, HOLD=False) if 'K' in kernel.arg_names else dict(FIRST=False, LAST=False, PROPOSED=True)
    constants |= dict(ATOMIC=True) if 'ATOMIC' in kernel.arg_names else {}
    shared = [compiled(kernel, tile, 128, True, **constants).metadata.shared for tile in TILES[kernel][128]]
    assert min(shared) <= SHARED
