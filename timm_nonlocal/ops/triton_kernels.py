"""Triton kernels of the nonlocal stage: A is never in memory.

As in FlashAttention (Dao et al., 2022; Dao, 2023), a tile of A is made from Q, K and two numbers a row whenever it is
needed: pᵢⱼ = 2^(s log₂e qᵢ·kⱼ - row_maxᵢ) and Aᵢⱼ = pᵢⱼ / row_sumᵢ. Here row_maxᵢ is the row's largest exponent,
rounded up to a whole number: since rescaling by a power of two commutes with rounding, row_sumᵢ is the sum of just
those rounded pᵢⱼ that every A G uses, and the rows of A sum to one in float32. The way back takes A at once, from
lse = row_max + log₂ row_sum. Exponents are rounded before row_max is taken off (`FUSION`): a fused multiply-add would
take it off the exact product, from which a huge row_max, itself rounded, differs by thousands, and p would be 0 or ∞.

Each kernel ends with what the next one starts from (G of the next sub-block, dH of the one before), which depends on
no rows but its own. k sub-blocks take k kernels forward and k + 1 backward.

Shapes: b images, M positions, D embedding channels, k sub-blocks of C channels each (C' elsewhere). `ld` is the number
of elements from one row to the next; images follow each other without a gap.
"""

# The types are Triton's, which compiles this.
# mypy: ignore-errors

import triton
import triton.language as tl

__all__ = ['FUSION', 'apply', 'apply_transposed', 'close_keys', 'close_queries']

FUSION = False  # `enable_fp_fusion` of every launch


@triton.jit
def _load(pointer, rows, ld, positions, columns, width, EVEN: tl.constexpr):
    """rows × columns of an image's matrix, zero outside of its M rows and its width; EVEN where nothing is outside."""
    pointer += rows[:, None] * ld + columns[None, :]
    if EVEN:
        return tl.load(pointer)
    return tl.load(pointer, mask=(rows[:, None] < positions) & (columns[None, :] < width), other=0.0)


@triton.jit
def _store(pointer, tile, rows, ld, positions, columns, width, EVEN: tl.constexpr):
    tile = tile.to(pointer.dtype.element_ty)
    pointer += rows[:, None] * ld + columns[None, :]
    if EVEN:
        tl.store(pointer, tile)
    else:
        tl.store(pointer, tile, mask=(rows[:, None] < positions) & (columns[None, :] < width))


@triton.jit
def _affinity(s, most):
    """p or A from exponents and row_max or lse, at most 1: two orders of adding up a huge one differ by more than 1."""
    return tl.exp2(tl.minimum(s - most, 0.0))


@triton.jit(do_not_specialize=['n'])
def apply(
        q_ptr, k_ptr, g_ptr, h_ptr, t_ptr, row_stats_ptr, n, ld_q, ld_g, ld_h, ld_t, positions, exponent,
        D: tl.constexpr, C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, EVEN: tl.constexpr,
        OWN: tl.constexpr, STEP: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, PROPOSED: tl.constexpr,
):
    """Hⁿ = A Gⁿ - Gⁿ in some rows of an image, then Gⁿ⁺¹ = G⁰ⁿ⁺¹ + Σ_{m≤n} Hᵐ Tᵀ there.

    FIRST also finds row_max, row_sum and lse. What rounding takes off H goes to the second half of its rows. Unless
    PROPOSED, Hⁿ = A Gⁿ.
    """
    image = tl.program_id(1).to(tl.int64) * positions
    q_ptr += image * ld_q
    k_ptr += image * ld_q
    g_ptr += image * ld_g
    h_ptr += image * ld_h
    rows = tl.program_id(0) * OWN + tl.arange(0, OWN)
    row_max_ptr = row_stats_ptr + image * 3 + rows
    row_sum_ptr = row_max_ptr + positions
    d, c = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_C)
    q = _load(q_ptr, rows, ld_q, positions, d, D, EVEN)
    if FIRST:
        row_max = tl.full([OWN], float('-inf'), tl.float32)
        row_sum = tl.zeros([OWN], tl.float32)
    else:
        row_max = tl.load(row_max_ptr, rows < positions, 0.0)
        row_sum = tl.load(row_sum_ptr, rows < positions, 1.0)
    total = tl.zeros([OWN, BLOCK_C], tl.float32)
    for start in range(0, positions, STEP):
        columns = start + tl.arange(0, STEP)
        k = _load(k_ptr, columns, ld_q, positions, d, D, EVEN)
        g = _load(g_ptr + n * C, columns, ld_g, positions, c, C, EVEN)
        s = tl.dot(q, tl.trans(k)) * exponent
        if not EVEN:
            s = tl.where(columns[None, :] < positions, s, float('-inf'))
        if FIRST:
            higher = tl.maximum(row_max, tl.ceil(tl.max(s, 1)))
            p = tl.exp2(s - higher[:, None]).to(q.dtype)
            shrink = tl.exp2(row_max - higher)
            row_sum = row_sum * shrink + tl.sum(p.to(tl.float32), 1)
            total = total * shrink[:, None]
            row_max = higher
        else:
            p = _affinity(s, row_max[:, None]).to(q.dtype)
        total = tl.dot(p, g, total)
    if FIRST:
        tl.store(row_max_ptr, row_max, rows < positions)
        tl.store(row_sum_ptr, row_sum, rows < positions)
        tl.store(row_sum_ptr + positions, row_max + tl.log2(row_sum), rows < positions)
    exact = total / row_sum[:, None]
    if PROPOSED:
        exact -= _load(g_ptr + n * C, rows, ld_g, positions, c, C, EVEN)
    h = exact.to(q.dtype)
    _store(h_ptr + n * C, h, rows, ld_h, positions, c, C, EVEN)
    _store(h_ptr + ld_h // 2 + n * C, exact - h, rows, ld_h, positions, c, C, EVEN)
    if not LAST:
        t_ptr += (n + 1) * C * ld_t  # the rows of T for Gⁿ⁺¹
        following = _load(g_ptr + (n + 1) * C, rows, ld_g, positions, c, C, EVEN).to(tl.float32)
        t = _load(t_ptr + n * C, c, ld_t, C, c, C, EVEN)
        following = tl.dot(h, tl.trans(t), following)
        for earlier in range(n):
            h = _load(h_ptr + earlier * C, rows, ld_h, positions, c, C, EVEN)
            t = _load(t_ptr + earlier * C, c, ld_t, C, c, C, EVEN)
            following = tl.dot(h, tl.trans(t), following)
        _store(g_ptr + (n + 1) * C, following, rows, ld_g, positions, c, C, EVEN)


@triton.jit(do_not_specialize=['n', 'k'])
def apply_transposed(
        q_ptr, k_ptr, g_ptr, h_ptr, t_ptr, row_stats_ptr, dg_ptr, dh_ptr, delta_ptr, n, k,
        ld_q, ld_g, ld_h, ld_t, ld_dg, ld_dh, positions, exponent,
        D: tl.constexpr, C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, EVEN: tl.constexpr,
        OWN: tl.constexpr, STEP: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, PROPOSED: tl.constexpr,
):
    """dGⁿ = Aᵀ dHⁿ - dHⁿ in some columns of an image's A, then dHⁿ⁻¹ += Σ_{m≥n} dGᵐ T there.

    FIRST is n = 0 and LAST n = k - 1, where the way back starts. δ = Σₙ rowsum(dHⁿ (Hⁿ + Gⁿ)) = rowsum(A dA), since
    Hⁿ + Gⁿ = A Gⁿ; H is taken before its rounding, which would not cancel in dA - δ. Unless PROPOSED, Hⁿ = A Gⁿ.
    """
    image = tl.program_id(1).to(tl.int64) * positions
    q_ptr += image * ld_q
    k_ptr += image * ld_q
    g_ptr += image * ld_g
    h_ptr += image * ld_h
    dg_ptr += image * ld_dg
    dh_ptr += image * ld_dh
    lse_ptr = row_stats_ptr + image * 3 + 2 * positions
    delta_ptr += image
    columns = tl.program_id(0) * OWN + tl.arange(0, OWN)
    d, c = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_C)
    keys = _load(k_ptr, columns, ld_q, positions, d, D, EVEN)
    total = tl.zeros([OWN, BLOCK_C], tl.float32)
    for start in range(0, positions, STEP):
        rows = start + tl.arange(0, STEP)
        q = _load(q_ptr, rows, ld_q, positions, d, D, EVEN)
        dh = _load(dh_ptr + n * C, rows, ld_dh, positions, c, C, EVEN)
        lse = tl.load(lse_ptr + rows, rows < positions, float('inf'))  # A = 0 in rows that are not there
        s = tl.dot(keys, tl.trans(q)) * exponent  # transposed: (OWN, STEP)
        total = tl.dot(_affinity(s, lse[None, :]).to(keys.dtype), dh, total)
    dh = _load(dh_ptr + n * C, columns, ld_dh, positions, c, C, EVEN)
    applied = _load(h_ptr + n * C, columns, ld_h, positions, c, C, EVEN).to(tl.float32)
    applied += _load(h_ptr + ld_h // 2 + n * C, columns, ld_h, positions, c, C, EVEN)
    if PROPOSED:
        applied += _load(g_ptr + n * C, columns, ld_g, positions, c, C, EVEN)
        total -= dh
    dg = total.to(keys.dtype)
    _store(dg_ptr + n * C, dg, columns, ld_dg, positions, c, C, EVEN)
    delta = tl.sum(dh * applied, 1)
    if not LAST:
        delta += tl.load(delta_ptr + columns, columns < positions, 0.0)
    tl.store(delta_ptr + columns, delta, columns < positions)
    if not FIRST:
        t_ptr += (n - 1) * C  # the columns of T for Hⁿ⁻¹
        before = _load(dh_ptr + (n - 1) * C, columns, ld_dh, positions, c, C, EVEN).to(tl.float32)
        before = tl.dot(dg, _load(t_ptr + n * C * ld_t, c, ld_t, C, c, C, EVEN), before)
        for later in range(n + 1, k):
            dg = _load(dg_ptr + later * C, columns, ld_dg, positions, c, C, EVEN)
            t = _load(t_ptr + later * C * ld_t, c, ld_t, C, c, C, EVEN)
            before = tl.dot(dg, t, before)
        _store(dh_ptr + (n - 1) * C, before, columns, ld_dh, positions, c, C, EVEN)


@triton.jit
def close_keys(
        q_ptr, k_ptr, g_ptr, dh_ptr, row_stats_ptr, delta_ptr, dq_ptr, dk_ptr, scale,
        ld_q, ld_g, ld_dh, ld_dk, positions, exponent,
        K: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
        EVEN: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr, HOLD: tl.constexpr, ATOMIC: tl.constexpr,
):
    """dK = s dSᵀ Q in some columns of an image's dS = A (dA - δ), where dA = Σₙ dHⁿ Gⁿᵀ.

    ATOMIC adds what these columns contribute to dQ / s. HOLD keeps their G in registers.
    """
    image = tl.program_id(1).to(tl.int64) * positions
    q_ptr += image * ld_q
    k_ptr += image * ld_q
    g_ptr += image * ld_g
    dh_ptr += image * ld_dh
    lse_ptr = row_stats_ptr + image * 3 + 2 * positions
    delta_ptr += image
    columns = tl.program_id(0) * OWN + tl.arange(0, OWN)
    d, c = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_C)
    keys = _load(k_ptr, columns, ld_q, positions, d, D, EVEN)
    held = ()
    if HOLD:
        for n in tl.static_range(K):
            held += (_load(g_ptr + n * C, columns, ld_g, positions, c, C, EVEN),)
    dk = tl.zeros([OWN, BLOCK_D], tl.float32)
    for start in range(0, positions, STEP):
        rows = start + tl.arange(0, STEP)
        q = _load(q_ptr, rows, ld_q, positions, d, D, EVEN)
        lse = tl.load(lse_ptr + rows, rows < positions, float('inf'))  # A = 0 in rows that are not there
        delta = tl.load(delta_ptr + rows, rows < positions, 0.0)
        s = tl.dot(keys, tl.trans(q)) * exponent  # transposed: (OWN, STEP)
        if not EVEN:
            s = tl.where(columns[:, None] < positions, s, float('-inf'))
        da = tl.zeros([OWN, STEP], tl.float32)
        for n in tl.static_range(K):
            dh = _load(dh_ptr + n * C, rows, ld_dh, positions, c, C, EVEN)
            if HOLD:
                da = tl.dot(held[n], tl.trans(dh), da)
            else:
                da = tl.dot(_load(g_ptr + n * C, columns, ld_g, positions, c, C, EVEN), tl.trans(dh), da)
        ds = (_affinity(s, lse[None, :]) * (da - delta[None, :])).to(keys.dtype)
        dk = tl.dot(ds, q, dk)
        if ATOMIC:
            dq = tl.dot(tl.trans(ds), keys)
            pointer = dq_ptr + (image + rows[:, None]) * D + d[None, :]
            tl.atomic_add(pointer, dq, mask=(rows[:, None] < positions) & (d[None, :] < D), sem='relaxed')
    _store(dk_ptr + image * ld_dk, dk * scale, columns, ld_dk, positions, d, D, EVEN)


@triton.jit
def close_queries(
        q_ptr, k_ptr, g_ptr, dh_ptr, row_stats_ptr, delta_ptr, dq_ptr, scale,
        ld_q, ld_g, ld_dh, ld_dq, positions, exponent,
        K: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
        EVEN: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr, HOLD: tl.constexpr,
):
    """dQ = s dS K in some rows of an image's dS, summed in one order. HOLD keeps their dH in registers."""
    image = tl.program_id(1).to(tl.int64) * positions
    q_ptr += image * ld_q
    k_ptr += image * ld_q
    g_ptr += image * ld_g
    dh_ptr += image * ld_dh
    lse_ptr = row_stats_ptr + image * 3 + 2 * positions
    rows = tl.program_id(0) * OWN + tl.arange(0, OWN)
    d, c = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_C)
    q = _load(q_ptr, rows, ld_q, positions, d, D, EVEN)
    lse = tl.load(lse_ptr + rows, rows < positions, float('inf'))
    delta = tl.load(delta_ptr + image + rows, rows < positions, 0.0)
    held = ()
    if HOLD:
        for n in tl.static_range(K):
            held += (_load(dh_ptr + n * C, rows, ld_dh, positions, c, C, EVEN),)
    dq = tl.zeros([OWN, BLOCK_D], tl.float32)
    for start in range(0, positions, STEP):
        columns = start + tl.arange(0, STEP)
        keys = _load(k_ptr, columns, ld_q, positions, d, D, EVEN)
        s = tl.dot(q, tl.trans(keys)) * exponent
        if not EVEN:
            s = tl.where(columns[None, :] < positions, s, float('-inf'))
        da = tl.zeros([OWN, STEP], tl.float32)
        for n in tl.static_range(K):
            g = _load(g_ptr + n * C, columns, ld_g, positions, c, C, EVEN)
            if HOLD:
                da = tl.dot(held[n], tl.trans(g), da)
            else:
                da = tl.dot(_load(dh_ptr + n * C, rows, ld_dh, positions, c, C, EVEN), tl.trans(g), da)
        ds = (_affinity(s, lse[:, None]) * (da - delta[:, None])).to(q.dtype)
        dq = tl.dot(ds, keys, dq)
    _store(dq_ptr + image * ld_dq, dq * scale, rows, ld_dq, positions, d, D, EVEN)
