"""The Triton kernels compute what plain PyTorch does: on a GPU where there is one, else in Triton's interpreter.

The interpreter has no PTX, so the byte permutations are also evaluated on plain integers, as `prmt` is specified.
"""
# ruff: noqa: E402  (where Triton is missing, nothing here can be imported)

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton", reason="Triton, in which the kernels are written, is not installed")
import triton.language as tl

from optimum_ksparse import kernels
from optimum_ksparse.kernels import operators
from optimum_ksparse.kernels.candidates import aligned
from optimum_ksparse.kernels.triton import permute
from optimum_ksparse.kernels.triton.dense import decompress, gather
from optimum_ksparse.kernels.triton.dot import dot
from optimum_ksparse.kernels.triton.gemv import gemv
from optimum_ksparse.packing import pack_mask, unpack, unpack_mask
from optimum_ksparse.quantization import LIMITS, pack_integers

from ..conftest import thinned

INTERPRETED = bool(permute.INTERPRETED.value)
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
GROUPS = kernels.GROUPS
# Rows of 16 columns a lane or not, whole steps of all lanes or not, one step or several.
IN_FEATURES = {
    "2:4": [4, 8, 12, 16, 20, 36, 48, 512, 516, 640, 896, 1024, 2048],
    "4:8": [8, 16, 24, 40, 48, 512, 520, 640, 896, 1024, 2048],
}
GEMV_CONFIGS = [
    (tokens, config)
    for tokens in (1, 2, 4)
    for config in kernels.KERNELS["gemv"].configs(kernels.Problem(8, 8, tokens, "2:4", torch.float16, DEVICE))
]
if INTERPRETED:  # which has no warps
    GEMV_CONFIGS = [*{(tokens, config["rows"]): (tokens, config) for tokens, config in GEMV_CONFIGS}.values()]
TILES = [
    dict(zip(("rows", "tokens", "bytes", "warps", "stages", "splits", "permute"), tile, strict=True))
    for tile in [
        (32, 16, 32, 4, 4, 1, False),
        (64, 16, 32, 4, 4, 1, True),
        (64, 32, 32, 4, 3, 4, True),
        (16, 16, 16, 4, 2, 3, False),
        (64, 64, 16, 4, 3, 1, True),
        (128, 128, 16, 8, 2, 2, True),
    ]
]
# The interpreter takes some 20 milliseconds for each row, token and step of a kernel.
WORK = 4 if INTERPRETED else 1 << 20
EXAMPLES = settings(
    deadline=None,
    max_examples=3 if INTERPRETED else 60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def make_weight(out_features, in_features, pattern="2:4", dtype=torch.bfloat16, seed=0):
    """A random packed weight."""
    generator = torch.Generator().manual_seed(seed)
    m = GROUPS[pattern]
    scores = torch.rand(out_features, in_features // m, m, generator=generator)
    mask = scores.argsort(-1).argsort(-1).lt(m // 2).flatten(1)
    values = torch.randn(out_features, in_features // 2, generator=generator).to(dtype)
    return kernels.PackedWeight(values.to(DEVICE), pack_mask(mask).to(DEVICE), in_features, pattern)


def make_quantised(out_features, in_features, pattern, dtype, values, group_size, seed=0):
    """The same with values that are integers, and the weight in float64."""
    weight = make_weight(out_features, in_features, pattern, torch.float32, seed)
    low, high = LIMITS[values]
    integers = (weight.values * high / 3).round().clamp(low, high).to(torch.int8)
    groups = -(-in_features // group_size)
    scale = torch.rand(out_features, groups, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    by_column = scale.double().repeat_interleave(group_size, 1)[:, :in_features]
    exact_weight = unpack(integers.double(), weight.bits, in_features) * by_column
    packed = pack_integers(integers, values)
    return weight._replace(values=packed, scale=scale, group_size=group_size), exact_weight


def random_tensor(*shape, dtype=torch.bfloat16, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def dense(weight):
    return unpack(weight.values, weight.bits, weight.in_features)


def exact(x, weight, bias=None):
    """The product in float64."""
    y = x.double() @ dense(weight).double().T
    return y if bias is None else y + bias.double()


def assert_close(found, expected, dtype):
    assert found.shape == expected.shape
    assert found.dtype == dtype
    assert float(torch.linalg.norm(found.double() - expected)) <= TOLERANCE[dtype] * float(torch.linalg.norm(expected))


def assert_same_bits(found, expected):
    assert found.dtype == expected.dtype
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


def run(name, x, weight, bias, config):
    return kernels.Candidate(name, config).run(x, weight, bias)


@st.composite
def products(draw, divisor=4, most_tokens=4):
    """(x [tokens, in], weight, bias or None); `divisor` of in_features."""
    pattern = draw(st.sampled_from(sorted(GROUPS)))
    dtype = draw(st.sampled_from(sorted(TOLERANCE, key=str)))
    in_features = draw(st.sampled_from([number for number in IN_FEATURES[pattern] if number % divisor == 0]))
    tokens = draw(st.integers(1, most_tokens))
    steps = -(-in_features // 512) * min(tokens, 4)
    out_features = draw(st.integers(1, max(1, min(70, WORK // steps))))
    seed = draw(st.integers(0, 99))
    weight = make_weight(out_features, in_features, pattern, dtype, seed)
    bias = random_tensor(out_features, dtype=dtype, seed=seed + 1) if draw(st.booleans()) else None
    return random_tensor(tokens, in_features, dtype=dtype, seed=seed + 2), weight, bias


@given(
    pattern=st.sampled_from(sorted(GROUPS)),
    dtype=st.sampled_from(sorted(TOLERANCE, key=str)),
    values=st.sampled_from(sorted(LIMITS)),
    group_size=st.sampled_from([64, 128, 1024]),
    in_features=st.sampled_from([40, 64, 136, 528]),
    out_features=st.integers(1, 3),
    name=st.sampled_from(["gemv", "dot"]),
    seed=st.integers(0, 99),
    data=st.data(),
)
@EXAMPLES
def test_products_with_quantised_values(
    pattern, dtype, values, group_size, in_features, out_features, name, seed, data
):
    weight, exact_weight = make_quantised(out_features, in_features, pattern, dtype, values, group_size, seed)
    x = random_tensor(data.draw(st.integers(1, 3)), in_features, dtype=dtype, seed=seed)
    bias = random_tensor(out_features, dtype=dtype, seed=seed + 1) if data.draw(st.booleans()) else None
    configs = kernels.KERNELS[name].configs(weight.problem(len(x)))
    config = data.draw(st.sampled_from(configs)) if name == "gemv" else dict(TILES[0])
    y = run(name, x, weight, bias, config)
    expected = x.double() @ exact_weight.T + (0 if bias is None else bias.double())
    # A weight of several scales a row is rounded by `dot` before it is multiplied.
    assert y.dtype is dtype
    size = x.double().abs() @ exact_weight.abs().T
    assert float((y.double() - expected).norm()) <= TOLERANCE[dtype] * float(size.norm() + expected.norm())


@given(products(), st.data())
@EXAMPLES
def test_gemv_of_any_shape(product, data):
    x, weight, bias = product
    config = data.draw(st.sampled_from(kernels.KERNELS["gemv"].configs(weight.problem(x.shape[0]))))
    y = gemv(x, weight.values, weight.bits, bias, GROUPS[weight.pattern], **config)
    assert_close(y, exact(x, weight, bias), x.dtype)


@pytest.mark.parametrize(("tokens", "config"), thinned(GEMV_CONFIGS, [1]), ids=str)
def test_every_configuration_of_gemv(tokens, config):
    pattern, in_features = ("2:4", 528) if config["rows"] == 1 else ("4:8", 40)
    weight, bias = make_weight(config["rows"] + 1, in_features, pattern), random_tensor(config["rows"] + 1)
    x = random_tensor(tokens, in_features)
    y = gemv(x, weight.values, weight.bits, bias, GROUPS[pattern], **config)
    assert_close(y, exact(x, weight, bias), x.dtype)


@pytest.mark.slow
@given(products(divisor=8, most_tokens=20), st.sampled_from(TILES))
@EXAMPLES
def test_dot_of_any_shape(product, tile):
    x, weight, bias = product
    y = dot(x, weight.values, weight.bits, bias, GROUPS[weight.pattern], **tile)
    assert_close(y, exact(x, weight, bias), x.dtype)


@pytest.mark.parametrize("tile", thinned(TILES, TILES[:2]), ids=str)
def test_every_tile_of_dot(tile):
    pattern, in_features = ("2:4", 136) if tile["permute"] else ("4:8", 256)
    weight, bias = make_weight(40, in_features, pattern), random_tensor(40)
    x = random_tensor(tile["tokens"] + 3, in_features)
    y = dot(x, weight.values, weight.bits, bias, GROUPS[pattern], **tile)
    assert_close(y, exact(x, weight, bias), x.dtype)


@given(products(), st.integers(0, 99))
@EXAMPLES
def test_decompress_and_gather_keep_every_bit(product, seed):
    _, weight, _ = product
    m = GROUPS[weight.pattern]
    numbers = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(1 << 15), 1 << 15, (weight.out_features, weight.in_features), generator=numbers)
    entries = bits.to(DEVICE, torch.int16).view(weight.values.dtype)  # NaN and infinities among them
    mask = unpack_mask(weight.bits, weight.in_features)
    values = gather(entries, weight.bits, m)
    assert_same_bits(values, entries[mask].view_as(values))
    assert_same_bits(decompress(values, weight.bits, weight.in_features, m), entries.masked_fill(~mask, 0))
    assert_same_bits(dense(weight._replace(values=values)), entries.masked_fill(~mask, 0))


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_decompress_and_gather_of_all_masks(pattern):
    """Every mask of a byte, in each of the two bytes of a 16-bit word."""
    m = GROUPS[pattern]
    groups = [mask for mask in range(1 << m) if mask.bit_count() == m // 2]
    masks = groups if m == 8 else [low | high << 4 for low in groups for high in groups]
    bits = torch.tensor(masks * 2 + [masks[0]] * (-len(masks) % 4), dtype=torch.uint8, device=DEVICE)
    bits = torch.cat([bits[: len(masks)], bits[1 : len(masks)], bits[:1]]).view(2, -1)
    in_features = 8 * bits.shape[1]
    values = torch.arange(1, in_features + 1, dtype=torch.int16, device=DEVICE).view(2, -1).view(torch.float16)
    found = decompress(values, bits, in_features, GROUPS[pattern])
    assert_same_bits(found, unpack(values, bits, in_features))
    assert_same_bits(gather(found, bits, GROUPS[pattern]), values)


@pytest.mark.parametrize("rows", thinned([3, 8], [3]))
def test_decompress_in_chunks(rows, fences):
    weight, x = make_weight(7, 48), random_tensor(5, 48)
    for bias in (random_tensor(7), None):
        y = run("decompress", x, weight, bias, {"scratch": rows * 48 * 2})
        assert_close(y, exact(x, weight, bias), x.dtype)


class Fences:
    """Memory with something else on both sides of it, which a kernel must neither use nor change."""

    def __init__(self):
        self.buffers = []

    def put(self, tensor, fence):
        """A copy of a tensor between fences; 16-byte aligned."""
        buffer = torch.full((tensor.numel() + 128,), fence, dtype=tensor.dtype, device=tensor.device)
        inner = buffer[64:-64].view(tensor.shape)
        inner.copy_(tensor)
        self.buffers.append((buffer, buffer.clone()))
        return inner

    def check(self):
        for buffer, before in self.buffers:
            for end in (slice(64), slice(-64, None)):
                assert torch.equal(buffer[end].view(torch.uint8), before[end].view(torch.uint8))


@pytest.fixture
def fences(monkeypatch):
    """Outputs hold NaN before a kernel writes them, and lie between fences, which are checked in the end."""
    fences, new_empty = Fences(), torch.Tensor.new_empty

    def poisoned(self, *size, **options):
        tensor = new_empty(self, *size, **options)
        # Triton's interpreter makes empty tensors for purposes of its own.
        is_output = tensor.is_floating_point() and tensor.numel() > 0
        return fences.put(tensor.fill_(float("nan")), 7) if is_output else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    yield fences
    assert fences.buffers, "no output was made by new_empty"
    fences.check()


SHAPES = [
    ("2:4", 1, 4, 1),
    ("2:4", 3, 20, 3),
    ("4:8", 1, 8, 1),
    ("2:4", 2, 528, 2),
    ("4:8", 2, 24, 3),
    ("4:8", 5, 136, 17),
]


@pytest.mark.parametrize(("pattern", "out_features", "in_features", "tokens"), [*SHAPES[:3], *thinned(SHAPES[3:])])
def test_kernels_write_all_of_their_output_and_nothing_else(pattern, out_features, in_features, tokens, fences):
    """Nor do they use what lies beside their inputs: it is NaN, and mask bytes that keep everything."""
    weight = make_weight(out_features, in_features, pattern)
    x, bias = random_tensor(tokens, in_features), random_tensor(out_features)
    expected = exact(x, weight, bias)
    nan = float("nan")
    x, bias = fences.put(x, nan), fences.put(bias, nan)
    weight = weight._replace(values=fences.put(weight.values, nan), bits=fences.put(weight.bits, 255))
    problem = weight.problem(tokens)
    takes = [name for name in ("gemv", "dot", "decompress") if kernels.KERNELS[name].why_not(problem) is None]
    assert "decompress" in takes
    for name in takes:
        offered = TILES[1:4:2] if name == "dot" else kernels.KERNELS[name].configs(problem)[:2]
        for config in offered:
            y = run(name, x, weight, bias, config)
            assert y.isfinite().all(), (name, config)
            assert_close(y, expected, x.dtype)
    full = fences.put(dense(weight), nan)
    assert_same_bits(gather(full, weight.bits, GROUPS[pattern]), weight.values)


@pytest.mark.parametrize("tile", TILES[2:4], ids=str)
def test_empty_splits_count_as_zero(tile, fences):
    """A program of a split sum may find no columns left."""
    weight, x = make_weight(3, 8), random_tensor(2, 8)
    y = dot(x, weight.values, weight.bits, None, 4, **tile)
    assert_close(y, exact(x, weight), x.dtype)


def linear(x, weight, bias, name):
    return kernels.linear(x, weight.values, weight.bits, bias, weight.in_features, weight.pattern, name)


INPUTS = {
    "rank 1": lambda: random_tensor(48),
    "rank 4": lambda: random_tensor(1, 2, 1, 48),
    "transposed": lambda: random_tensor(48, 3).T,
    "every second column": lambda: random_tensor(3, 96)[:, ::2],
    "a slice of columns": lambda: random_tensor(3, 64)[:, 16:],
    "an odd offset": lambda: random_tensor(3 * 48 + 1)[1:].view(3, 48),
    "not 16-byte aligned": lambda: random_tensor(3 * 48 + 4)[4:].view(3, 48),
    "one row repeated": lambda: random_tensor(48).expand(3, 48),
}


@pytest.mark.parametrize("kind", thinned(INPUTS, [*INPUTS][:3]))
def test_inputs_of_any_form(kind):
    x, weight, bias = INPUTS[kind](), make_weight(2, 48), random_tensor(2)
    names, place = ("gemv", "dot", "decompress"), [*INPUTS].index(kind) % 3
    for name in names[place : place + 1] if INTERPRETED else names:
        y = linear(x, weight, bias, name)
        assert y.is_contiguous()
        assert_close(y, exact(x, weight, bias), x.dtype)
        assert linear(random_tensor(2, 0, 48), weight, None, name).shape == (2, 0, 2)


def shifted(tensor):
    """A copy that begins at an odd element."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view_as(tensor)


def strided(tensor):
    """A copy with something else between its columns."""
    return torch.stack([tensor, -tensor], -1)[..., 0]


@pytest.mark.slow
@pytest.mark.parametrize(("lie", "pattern"), [(shifted, "2:4"), (strided, "4:8")])
def test_weights_that_lie_badly(pattern, lie, monkeypatch):
    weight, x = make_weight(5, 48, pattern), random_tensor(2, 48)
    values, bits, full = lie(weight.values), lie(weight.bits), lie(random_tensor(5, 48))
    assert values.data_ptr() % 16 or not values.is_contiguous()
    for name in ("gemv", "dot", "decompress"):
        assert_close(linear(x, weight._replace(values=values, bits=bits), None, name), exact(x, weight), x.dtype)
    monkeypatch.setattr(operators, "_has_kernel", lambda *arguments: True)
    mask = unpack_mask(weight.bits, 48)
    assert_same_bits(kernels.decompress(values, bits, 48, pattern), dense(weight))
    assert_same_bits(gather(aligned(full), aligned(bits), GROUPS[pattern]), full[mask].view(5, 24))


@pytest.mark.parametrize(
    ("name", "tokens", "pattern", "dtype"),
    [("gemv", 4, "2:4", torch.float16), ("dot", 6, "4:8", torch.bfloat16), ("decompress", 6, "2:4", torch.bfloat16)],
)
def test_gradients_of_forced_kernels(name, tokens, pattern, dtype, monkeypatch):
    """The backward pass decompresses and gathers by kernels too."""
    monkeypatch.setattr(operators, "_has_kernel", lambda *arguments: True)
    weight, bias = make_weight(3, 24, pattern, dtype), random_tensor(3, dtype=dtype).requires_grad_()
    x = random_tensor(tokens, 24, dtype=dtype).requires_grad_()
    weight.values.requires_grad_()
    grad = random_tensor(tokens, 3, dtype=dtype, seed=3)
    y = linear(x, weight, bias, name)
    y.backward(grad)
    with torch.no_grad():
        full = grad.double().T @ x.double()
        mask = unpack_mask(weight.bits, 24)
        assert_close(y, exact(x, weight, bias), dtype)
        assert_close(x.grad, grad.double() @ dense(weight).double(), dtype)
        assert_close(weight.values.grad, full[mask].view_as(weight.values), dtype)
        assert_close(bias.grad, grad.double().sum(0), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemv", "dot", "decompress"])
def test_operator_with_a_forced_kernel_is_registered_correctly(name):
    weight, bias = make_weight(3, 16), random_tensor(3).requires_grad_()
    x = random_tensor(2, 16).requires_grad_()
    torch.library.opcheck(
        kernels.linear,
        (x, weight.values.requires_grad_(), weight.bits, bias, 16, "2:4", name),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


# The byte permutations, evaluated on plain integers.


def emulated_prmt(a, b, selector):
    """PTX `prmt.b32` as specified: a nibble's lowest three bits name a byte; its highest spreads that byte's sign."""
    source = (b & 0xFFFFFFFF) << 32 | (a & 0xFFFFFFFF)
    result = 0
    for k in range(4):
        nibble = selector >> 4 * k & 15
        byte = source >> 8 * (nibble & 7) & 255
        if nibble & 8:
            byte = 255 if byte & 128 else 0
        result |= byte << 8 * k
    return result


class Word(int):
    """An integer on which `.to(tl.int32)` keeps the lower half."""

    def __rshift__(self, places):
        return Word(int(self) >> places)

    def to(self, dtype):
        assert dtype is tl.int32
        return Word(int(self) & 0xFFFFFFFF)


@pytest.fixture
def formulas(monkeypatch):
    """The functions of `permute`, as Python that calls the emulated `prmt`."""
    names = ("kept_selectors", "kept_of_4", "kept_of_8", "place_selectors", "place_in_4", "next_of_8")
    functions = {name: getattr(permute, name).fn for name in names}
    monkeypatch.setattr(permute, "prmt", emulated_prmt)
    where = SimpleNamespace(where=lambda condition, a, b: a if condition else b, int32=tl.int32)
    monkeypatch.setattr(permute, "tl", where)
    return SimpleNamespace(**functions)


def pair(low, high):
    return high << 16 | low


def entries(*pairs):
    return [half for word in pairs for half in (word & 0xFFFF, word >> 16 & 0xFFFF)]


# Bytes with the sign bit and without, all different.
ENTRIES = [0x8182, 0x0304, 0xF586, 0x0788, 0x990A, 0x0B9C, 0x8D0E, 0x0F90]
NIBBLES = [sum(1 << place for place in places) for places in itertools.combinations(range(4), 2)]


@pytest.mark.parametrize("group", range(4))
@pytest.mark.parametrize("nibble", NIBBLES, ids=bin)
@pytest.mark.parametrize("others", NIBBLES, ids=bin)
def test_formulas_of_2_4(formulas, nibble, others, group):
    word = sum((nibble if place == group else others) << 4 * place for place in range(4))
    x = ENTRIES[:4]
    kept = [x[place] for place in range(4) if nibble >> place & 1]
    selectors = formulas.kept_selectors(word)
    # Only the lower half of a result is a pair's selector, and only the pair is what counts.
    found = formulas.kept_of_4(pair(*x[:2]), pair(*x[2:]), *selectors, group)
    assert entries(found) == kept
    low, high = formulas.place_in_4(pair(*kept), *formulas.place_selectors(word), group)
    assert entries(low, high) == [value if nibble >> place & 1 else 0 for place, value in enumerate(x)]


def test_formulas_of_4_8(formulas):
    table = permute.selector_table(torch.device("cpu"))
    masks = [byte for byte in range(256) if byte.bit_count() == 4]
    assert len(masks) == 70
    assert not any(int(table[byte]) for byte in range(256) if byte not in masks)
    x = [pair(*ENTRIES[2 * i : 2 * i + 2]) for i in range(4)]
    for byte in masks:
        kept = [ENTRIES[place] for place in range(8) if byte >> place & 1]
        assert entries(*formulas.kept_of_8(*x, Word(table[byte]))) == kept, bin(byte)
        front, back, placed = pair(*kept[:2]), pair(*kept[2:]), []
        for place in range(8):
            entry, front, back = formulas.next_of_8(front, back, byte & 1 << place)
            placed.append(entry & 0xFFFF)
        assert placed == [ENTRIES[place] if byte >> place & 1 else 0 for place in range(8)], bin(byte)


@triton.jit
def _permute_all(a_ptr, b_ptr, selector_ptr, result_ptr):
    at = tl.arange(0, 256)
    a, b, selector = tl.load(a_ptr + at), tl.load(b_ptr + at), tl.load(selector_ptr + at)
    tl.store(result_ptr + at, permute.prmt(a, b, selector))


def test_prmt_is_what_is_specified():
    """On a GPU, the instruction; elsewhere, what stands for it in the interpreter."""
    numbers = random.Random(0)
    a, b = ([numbers.randrange(-(1 << 31), 1 << 31) for _ in range(256)] for _ in range(2))
    selectors = [numbers.randrange(1 << 16) & 0x7777 for _ in range(256)]
    operands = [torch.tensor(row, dtype=torch.int32, device=DEVICE) for row in (a, b, selectors)]
    result = torch.zeros(256, dtype=torch.int32, device=DEVICE)
    _permute_all[(1,)](*operands, result)
    assert [int(word) & 0xFFFFFFFF for word in result] == [
        emulated_prmt(*operands) for operands in zip(a, b, selectors, strict=True)
    ]
