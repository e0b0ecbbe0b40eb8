"""Byte permutations that take kept entries out of groups, and put them back: what the Triton kernels share.

Everything here is elementwise on 32-bit words of two 16-bit entries, so that no layout of a tile can make it wrong.
A *group* is the m consecutive weights of n:m. A *pair* is two neighbouring entries, the lower one in the lower half.

A selector is the third operand of PTX's `prmt.b32`: each of its four lowest nibbles names one of the eight bytes of
the first two operands. To pick a 16-bit entry i, its two bytes are named: `0x10 + 0x22 * i`. `prmt` is also the table
look-up: with a mask's nibbles as the selector it reads four entries of an eight-byte table at once, which is how
selectors come out of the stored bitmask without a branch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# True where kernels run in Triton's interpreter, on the CPU: it has no PTX, and its bfloat16 products are wrong.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def value_bits(values: torch.Tensor) -> int:
    """Bits of one of the packed values."""
    return {torch.int8: 8, torch.uint8: 4}.get(values.dtype, 16)


def columns_of_scale(scale: torch.Tensor | None, group_size: int) -> int:
    """How many columns share a scale; 0 where all of a row do, or there is none."""
    return 0 if scale is None or scale.shape[1] == 1 else group_size


@triton.jit
def prmt(a, b, selector):
    """PTX `prmt.b32`: byte k of the result is the byte of (a, b) that nibble k of `selector` (0 to 7) names."""
    if INTERPRETED:
        zero = (a & 0) + (b & 0) + (selector & 0)  # an operand may be a constant
        low, high = (a + zero).to(tl.uint32, bitcast=True), (b + zero).to(tl.uint32, bitcast=True)
        data = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
        shifts = (selector + zero).to(tl.uint64) << 3
        result = (data >> (shifts & 56)) & 0xFF
        for k in tl.static_range(1, 4):
            result |= ((data >> ((shifts >> (4 * k)) & 56)) & 0xFF) << (8 * k)
        return result.to(tl.uint32).to(tl.int32, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def load_nibbles(bits_ptr, row, steps, groups, step, lane, place, inside, ALIGNED: tl.constexpr):
    """Masks of groups of 2:4, `place` [lanes, 4] counting from `step`; a lane has 16 columns, a *step* of columns.

    Returns:
        word: [lanes, 1] with the four nibbles of a lane's groups and group [1, 4] their numbers, where rows are
        ALIGNED to steps; otherwise a nibble a group, [lanes, 4], all with the number 0.
    """
    if ALIGNED:
        at = bits_ptr + row * steps + step + lane
        word = tl.load(at) if inside is None else tl.load(at, mask=step + lane < steps, other=0)
        return word.to(tl.int32)[:, None], tl.arange(0, 4)[None, :]
    else:
        group = step * 4 + place
        byte = tl.load(bits_ptr + row * ((groups + 1) // 2) + group // 2, mask=inside, other=0).to(tl.int32)
        return (byte >> (group % 2 * 4)) & 15, 0


@triton.jit
def integer(word, place: tl.constexpr, BITS: tl.constexpr):
    """The integer of BITS bits at a place of an int32 word, as a float."""
    return ((word << (32 - BITS * (place + 1))) >> (32 - BITS)).to(tl.float32)


@triton.jit
def pair_of(low, high, DTYPE: tl.constexpr):
    """Two floats, rounded to 16 bit, as a pair."""
    first = low.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return first | (high.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def kept_selectors(word):
    """For up to four groups of 2:4, a nibble each in `word`: byte g of the first result selects the first kept entry
    of group g, of the second result the second. Three bits tell each: the first kept one is among entries 0 to 2, the
    second among 1 to 3."""
    first = prmt(0x10321010, 0x10321054, word & 0x7777)
    second = prmt(0x54543232, 0x76767676, (word >> 1) & 0x7777)
    return first, second


@triton.jit
def kept_of_4(low, high, first, second, group):
    """The two kept entries of a group of 2:4 as a pair. `low`, `high`: the group's four entries as pairs."""
    return prmt(low, high, prmt(first, second, 0x40 + 0x11 * group))


@triton.jit
def kept_of_8(x01, x23, x45, x67, selectors):
    """The four kept entries of a group of 4:8 as two pairs; `selectors` comes from `selector_table`. The first two are
    among entries 0 to 5, the last two among 2 to 7, so two permutations give each pair."""
    front = selectors.to(tl.int32)
    back = (selectors >> 32).to(tl.int32)
    return (
        prmt(prmt(x01, x23, front), x45, front >> 16),
        prmt(prmt(x45, x67, back), x23, back >> 16),
    )


@triton.jit
def place_selectors(word):
    """For up to four groups of 2:4, a nibble each in `word`: byte g of the four results selects, out of (kept pair,
    0), what stands at entries 0, 1, 2, 3 of group g. Two bits tell each pair of entries: if one of two is kept, then
    so is one of the other two."""
    lower = word & 0x3333
    upper = (word >> 2) & 0x3333
    return (
        prmt(0x10541054, 0, lower),
        prmt(0x32105454, 0, lower),
        prmt(0x10543254, 0, upper),
        prmt(0x32325454, 0, upper),
    )


@triton.jit
def place_in_4(kept, at0, at1, at2, at3, group):
    """A group of 2:4 with its zeros, as two pairs. `kept`: its two kept entries."""
    which = 0x40 + 0x11 * group
    return prmt(kept, 0, prmt(at0, at1, which)), prmt(kept, 0, prmt(at2, at3, which))


@triton.jit
def next_of_8(front, back, is_kept):
    """One step through a group of 4:8: the entry (in the lower half) that stands at a place, and what is left of the
    kept entries behind it. `front`, `back`: the kept entries not yet placed, as pairs; `is_kept`: the place's bit."""
    entry = tl.where(is_kept != 0, front, 0)
    moved = tl.where(is_kept != 0, prmt(front, back, 0x5432), front)
    return entry, moved, tl.where(is_kept != 0, back >> 16, back)


@triton.jit
def widen(pair, DTYPE: tl.constexpr):
    """A pair of bfloat16 or float16 as two float32."""
    if tl.bfloat16 == DTYPE:
        return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
    else:
        low = pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return low, (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


_tables: dict[torch.device, torch.Tensor] = {}


def selector_table(device: torch.device) -> torch.Tensor:
    """[256] int64: for each mask byte of 4:8 the four selectors of `kept_of_8`, 16 bits each; 0 for a byte that does
    not keep four."""
    if device not in _tables:
        table = [0] * 256
        for byte in range(256):
            places = [place for place in range(8) if byte >> place & 1]
            if len(places) == 4:
                table[byte] = _selectors(places)
        _tables[device] = torch.tensor(table, dtype=torch.int64, device=device)
    return _tables[device]


def _selectors(places: list[int]) -> int:
    """Selectors for (x01, x23), then x45 in the place of what is not there; (x45, x67), then x23."""
    packed = 0
    for half, (pair, base) in enumerate(((places[:2], 0), (places[2:], 4))):
        near = far = 0
        for slot, place in enumerate(pair):
            is_near = base <= place < base + 4
            near |= (0x10 + 0x22 * (place - base) if is_near else 0) << 8 * slot
            # The other operand's first entry is 4 in the lower half, 2 in the upper one.
            far |= (0x10 + 0x22 * (slot if is_near else 2 + place - (4 if half == 0 else 2))) << 8 * slot
        packed |= (near | far << 16) << 32 * half
    return packed - (1 << 64) if packed >> 63 else packed
