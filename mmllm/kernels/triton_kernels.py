"""The Triton kernels of a decoding step on a GPU: `project`, a matrix product with what surrounds it, and
attention: `attend`, before it `store` where several rows are of one slot, after it `join` where it is in parts.
And one for training: `adamw8bit`.

Importing this module needs triton, which is not installed everywhere; gpu.py and adamw8bit.py call the kernels.

Everything but the matrices and the cache is float32. Blocks are sized by the arguments in capitals.
"""

import triton
import triton.language as tl


@triton.jit
def project(
    x, norm, w, scale, bias, w2, scale2, y, rows, outs, width, eps,
    ADD: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """y (rows, outs) = x (rows, width) times the rows of w, for ROWS rows and OUTS outputs; what is None is left out.

    norm (width): RMSNorm of x. scale (outs): of int8 rows. bias (outs). w2, scale2: silu(x w) * (x w2). ADD: to what y
    holds. DTYPE: of x in the products.
    """
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    o = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    sums = tl.zeros((OUTS, WIDTH if ROWS == 1 else ROWS), tl.float32)
    sums2 = sums
    squares = tl.zeros((ROWS,), tl.float32)
    for first in range(0, width, WIDTH):
        k = first + tl.arange(0, WIDTH)
        inside = (m[:, None] < rows) & (k[None, :] < width)
        xs = tl.load(x + m[:, None] * width + k[None, :], mask=inside, other=0.0).to(tl.float32)
        if norm is not None:  # the row's factor is applied last: it is known when all of the row has been read
            squares += tl.sum(xs * xs, 1)
            xs *= tl.load(norm + k, mask=k < width, other=0.0).to(tl.float32)[None, :]
        xs = xs.to(DTYPE)
        sums = plus_product(sums, w, xs, o, k, outs, width, ROWS)
        if w2 is not None:
            sums2 = plus_product(sums2, w2, xs, o, k, outs, width, ROWS)
    factor = tl.rsqrt(squares / width + eps) if norm is not None else squares + 1.0
    result = finished(sums, scale, bias, factor, o, outs, ROWS)
    if w2 is not None:
        result = result * tl.sigmoid(result) * finished(sums2, scale2, None, factor, o, outs, ROWS)
    y_at = y + m[None, :] * outs + o[:, None]
    is_there = (m[None, :] < rows) & (o[:, None] < outs)
    if ADD:
        result += tl.load(y_at, mask=is_there, other=0.0)
    tl.store(y_at, result.to(y.dtype.element_ty), mask=is_there)


@triton.jit
def plus_product(sums, w, xs, o, k, outs, width, ROWS: tl.constexpr):
    """`sums` plus the product of some columns. One row: (OUTS, WIDTH), added up by `finished`; more: (OUTS, ROWS)."""
    inside = (o[:, None] < outs) & (k[None, :] < width)
    ws = tl.load(w + o[:, None].to(tl.int64) * width + k[None, :], mask=inside, other=0.0)
    if ROWS == 1:
        sums += ws.to(tl.float32) * xs.to(tl.float32)
    else:
        sums = tl.dot(ws.to(xs.dtype), tl.trans(xs), sums, input_precision="ieee")
    return sums


@triton.jit
def finished(sums, scale, bias, factor, o, outs, ROWS: tl.constexpr):
    if ROWS == 1:
        sums = tl.sum(sums, 1)[:, None]
    sums *= factor[None, :]
    if scale is not None:
        sums *= tl.load(scale + o, mask=o < outs, other=0.0)[:, None]
    if bias is not None:
        sums += tl.load(bias + o, mask=o < outs, other=0.0).to(tl.float32)[:, None]
    return sums


@triton.jit
def store(
    qkv, k_norm, cos, sin, keys, values, slots, positions, capacity, eps,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """Puts the key and value of a row and a key head into the cache; the arguments are those of `attend`."""
    row, group = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + row)
    d = tl.arange(0, HEAD)[None, :]
    at = tl.maximum(position, 0) * HEAD + d
    start = (tl.load(slots + row) * GROUPS + group).to(tl.int64) * capacity * HEAD
    qkv += row * (HEADS + 2 * GROUPS) * HEAD
    cos_d, sin_d = tl.load(cos + at), tl.load(sin + at)
    stored(qkv, group, k_norm, cos_d, sin_d, d, keys, values, start + at, position >= 0, eps, HEADS, GROUPS, HEAD)


@triton.jit
def stored(
    row, group, k_norm, cos_d, sin_d, d, keys, values, at, is_stored, eps,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """The new key and value of a key head, which it puts into the cache."""
    one = tl.zeros((1, 1), tl.int32)
    key = rotated(row + (HEADS + group) * HEAD + one, one == 0, k_norm, cos_d, sin_d, d, eps, HEAD)
    key = key.to(keys.dtype.element_ty)
    value = tl.load(row + (HEADS + GROUPS + group) * HEAD + d).to(keys.dtype.element_ty)
    tl.store(keys + at, key, mask=(one == 0) & is_stored)
    tl.store(values + at, value, mask=(one == 0) & is_stored)
    return key, value


@triton.jit
def attend(
    qkv, q_norm, k_norm, cos, sin, keys, values, slots, positions, x, tops, totals, capacity, eps, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HEAD: tl.constexpr, PARTS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STORES: tl.constexpr,
):  # fmt: skip
    """Attention of one token, for a row, a key head and a part of the keys of the row's slot.

    qkv (rows, (HEADS + 2 GROUPS) HEAD); cos, sin (capacity, HEAD); keys, values (S, GROUPS, capacity, HEAD); slots and
    positions (rows), -1 where a row takes no part. STORES: the token's own key is put into the cache here, and no slot has
    two rows; else `store` was called before. One part: x (rows, HEADS, HEAD). Several: sums x (rows, PARTS, HEADS, HEAD) whose
    weights are relative to the largest score `tops`, and the sums of weights `totals` (rows, PARTS, HEADS), for `join`.
    """
    row, group, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + row)
    own = tl.maximum(position, 0)
    d = tl.arange(0, HEAD)[None, :]
    query = tl.arange(0, QUERIES)
    head = group * (HEADS // GROUPS) + query
    here = (query < HEADS // GROUPS)[:, None]
    start = (tl.load(slots + row) * GROUPS + group).to(tl.int64) * capacity * HEAD
    qkv += row * (HEADS + 2 * GROUPS) * HEAD
    cos_d, sin_d = tl.load(cos + own * HEAD + d), tl.load(sin + own * HEAD + d)
    q = rotated(qkv + head[:, None] * HEAD, here, q_norm, cos_d, sin_d, d, eps, HEAD).to(keys.dtype.element_ty)
    top = tl.zeros((QUERIES,), tl.float32) - 1e30
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, HEAD), tl.float32)
    count = own + 1
    if STORES:  # the first part begins with the new token, so that no program reads what another one stores
        is_first = part == 0
        is_stored = is_first & (position >= 0)
        at = start + own * HEAD + d
        key, value = stored(qkv, group, k_norm, cos_d, sin_d, d, keys, values, at, is_stored, eps, HEADS, GROUPS, HEAD)
        top = tl.where(is_first, tl.sum(q.to(tl.float32) * key.to(tl.float32), 1) * scale, top)
        total = tl.where(is_first, total + 1, total)
        sums = tl.where(is_first, sums + value.to(tl.float32), sums)
        count = own
    chunk = tl.cdiv(tl.cdiv(count, PARTS), KEYS) * KEYS
    end = tl.minimum((part + 1) * chunk, count)
    for first in range(part * chunk, end, KEYS):
        n = (first + tl.arange(0, KEYS))[:, None]
        ks = tl.load(keys + start + n * HEAD + d, mask=n < end, other=0.0)
        vs = tl.load(values + start + n * HEAD + d, mask=n < end, other=0.0)
        scores = tl.dot(q, tl.trans(ks), input_precision="ieee") * scale
        scores = tl.where(tl.trans(n) < end, scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights, share = tl.exp(scores - higher[:, None]), tl.exp(top - higher)
        total = total * share + tl.sum(weights, 1)
        sums = tl.dot(weights.to(vs.dtype), vs, sums * share[:, None], input_precision="ieee")
        top = higher
    head_at = (row * PARTS + part) * HEADS + head
    if PARTS == 1:
        sums /= total[:, None]
    else:
        tl.store(tops + head_at, top, mask=query < HEADS // GROUPS)
        tl.store(totals + head_at, total, mask=query < HEADS // GROUPS)
    tl.store(x + head_at[:, None] * HEAD + d, sums.to(x.dtype.element_ty), mask=here)


@triton.jit
def rotated(rows, is_there, norm, cos_d, sin_d, d, eps, HEAD: tl.constexpr):
    """Rows of a head's size, normalised where there is a norm, then rotated by RoPE; sin is negative in the first half."""
    other = (d + HEAD // 2) % HEAD
    xs = tl.load(rows + d, mask=is_there, other=0.0)
    swapped = tl.load(rows + other, mask=is_there, other=0.0)
    if norm is not None:
        factor = tl.rsqrt(tl.sum(xs * xs, 1) / HEAD + eps)[:, None]
        xs *= factor * tl.load(norm + d).to(tl.float32)
        swapped *= factor * tl.load(norm + other).to(tl.float32)
    return xs * cos_d + swapped * sin_d


@triton.jit
def join(x, tops, totals, y, HEADS: tl.constexpr, HEAD: tl.constexpr, PARTS: tl.constexpr):
    """y (slots, HEADS, HEAD) from the parts that `attend` stored, for a slot and a head."""
    slot, head = tl.program_id(0), tl.program_id(1)
    head_at = (slot * PARTS + tl.arange(0, PARTS)) * HEADS + head
    d = tl.arange(0, HEAD)
    top = tl.load(tops + head_at)
    share = tl.exp(top - tl.max(top, 0))
    sums = tl.sum(tl.load(x + head_at[:, None] * HEAD + d[None, :]) * share[:, None], 0)
    total = tl.sum(tl.load(totals + head_at) * share, 0)
    tl.store(y + (slot * HEADS + head) * HEAD + d, (sums / total).to(y.dtype.element_ty))


@triton.jit
def adamw8bit(
    p, grad, first, second, first_scale, second_scale, noise, numel, noises, beta1, beta2, eps, kept, correction, rate,
    OCTAVES: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Updates BLOCKS blocks of a parameter and its moments as `AdamW8bit` does; without scales these are float32.

    noise (2, noises): random numbers for both moments, used again after `noises` values.
    """
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None].to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside, is_block = at < numel, block * BLOCK < numel
    m = tl.load(first + at, mask=inside, other=0).to(tl.float32)
    v = tl.load(second + at, mask=inside, other=0).to(tl.float32)
    if first_scale is not None:
        m *= tl.abs(m) * (tl.load(first_scale + block, mask=is_block, other=0.0) / (127.0 * 127.0))[:, None]
        scale = tl.load(second_scale + block, mask=is_block, other=0.0)[:, None]
        v = tl.where(v > 0, tl.exp2((v - 255.0) * (OCTAVES / 254.0)) * scale, 0.0)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    m += (1.0 - beta1) * (g - m)
    v = v * beta2 + (1.0 - beta2) * g * g
    if first_scale is None:
        m_code, v_code = m, v
    else:
        m_top, v_top = tl.max(tl.abs(m), 1), tl.max(v, 1)
        tl.store(first_scale + block, m_top, mask=is_block)
        tl.store(second_scale + block, v_top, mask=is_block)
        noise_at = noise + at % noises
        m_share = tl.abs(m) / tl.maximum(m_top, 1.1754944e-38)[:, None]  # the smallest normal number: no 0 / 0
        v_share = v / tl.maximum(v_top, 1.1754944e-38)[:, None]
        m_code = tl.load(noise_at, mask=inside, other=0.0) + 127.0 * tl.sqrt(m_share)
        m_code = tl.where(m < 0, -m_code, m_code)  # to an integer: towards zero
        v_code = tl.load(noise_at + noises, mask=inside, other=0.0) + (254.0 / OCTAVES) * tl.log2(v_share) + 255.0
        v_code = tl.where(v_share > 0, tl.maximum(v_code, 1.0), 0.0)
    tl.store(first + at, m_code.to(first.dtype.element_ty), mask=inside)
    tl.store(second + at, v_code.to(second.dtype.element_ty), mask=inside)
    moved = tl.load(p + at, mask=inside, other=0.0) * kept + rate * m / (tl.sqrt(v / correction) + eps)
    tl.store(p + at, moved, mask=inside)
