"""The noise stream: known answers, the same bits from the reference and C++ at every SIMD level, what seeds mean."""

import hashlib
from collections.abc import Iterator
from functools import cache

import noise_cases
import numpy as np
import op_checks
import pytest
import torch
from noise_cases import LEVELS, assert_same, at_level
from tails import IMPROBABLE, chi_square_tail
from torch import Tensor
from torch.library import opcheck

import quaver
from quaver.kernels import (
    _native,
    philox_normal,
    philox_permutation,
    philox_rademacher,
    philox_uniform,
    philox_words,
    seed_for,
    use_backend,
)
from quaver.kernels.philox import reference

MAKERS = {"normal": philox_normal, "rademacher": philox_rademacher, "uniform": philox_uniform}
DOMAINS = {"normal": 0, "rademacher": 1, "uniform": 2}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, answer.
KNOWN_ANSWERS = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)


def _signed(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


@pytest.fixture(params=KNOWN_ANSWERS, ids=("zeros", "ones", "pi"))
def known_answer(request: pytest.FixtureRequest) -> tuple[list[int], list[int], Tensor]:
    counter, key, answer = ([int(word, 16) for word in words.split()] for words in request.param)
    return counter, key, torch.tensor(answer)


def _block_and_seed(counter: list[int], key: list[int]) -> tuple[int, int]:
    return _signed(counter[1] << 32 | counter[0]), _signed(key[1] << 32 | key[0])


def test_known_answers_of_the_reference(known_answer):
    counter, key, answer = known_answer
    block, seed = _block_and_seed(counter, key)
    words = reference.philox_4x32(tuple(torch.tensor(word) for word in counter), torch.tensor(seed))
    assert_same("words", "reference = Random123", torch.stack(words), answer)
    words = reference.words_of_blocks(torch.tensor(block), torch.tensor(seed), counter[2], counter[3])
    assert_same("words", "reference = Random123", words, answer)


def test_known_answers_of_native(known_answer):
    counter, key, answer = known_answer
    words = torch.from_numpy(_native.philox_4x32(counter, key).astype(np.int64))
    assert_same("words", "_native = Random123", words, answer)


@pytest.mark.parametrize("level", LEVELS)
def test_known_answers_of_the_op(known_answer, level):
    counter, key, answer = known_answer
    block, seed = _block_and_seed(counter, key)
    out = torch.empty(4, dtype=torch.int64)
    with at_level(level):
        torch.ops.quaver.philox_words_(out, torch.tensor(seed), counter[2], counter[3], block, 0)
    assert_same("words", f"{level} = Random123", out, answer)


def test_known_answer_of_the_public_function():
    """The one whose block is below 2^61, where element offsets end."""
    assert philox_words(4, 0).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


# ---- the same bits from the reference and from C++ at every level -------------------------------------------------


@cache
def _noise_at_sources(domain: int) -> list[tuple[tuple[int, int, int, int], Tensor]]:
    """The reference at every one of `sources`, once for all levels."""
    return [
        (source, reference.fill((count,), torch.tensor(seed), stream, domain, offset, "cpu"))
        for source in noise_cases.sources(1 + domain)
        for seed, stream, offset, count in (source,)
    ]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("distribution", MAKERS)
def test_levels_equal_the_reference(distribution, level):
    with at_level(level):
        for (seed, stream, offset, count), expected in _noise_at_sources(DOMAINS[distribution]):
            got = MAKERS[distribution](count, seed, stream=stream, offset=offset, dtype=torch.float32)
            assert_same(distribution, f"{level} = reference", got, expected)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bias", (0, 256), ids=("weight", "bias"))
@pytest.mark.parametrize("distribution", MAKERS)
def test_native_equals_the_op_and_the_reference(distribution, bias, level):
    domain = DOMAINS[distribution] + bias
    with at_level(level):
        for (seed, stream, offset, count), expected in _noise_at_sources(domain):
            got = torch.from_numpy(_native.noise(count, seed % 2**64, stream, domain, offset))
            op = torch.empty(count)
            torch.ops.quaver.philox_fill_(op, torch.tensor(seed), stream, domain, offset)
            assert_same(distribution, f"_native {level} = op", got, op)
            assert_same(distribution, f"{level} = reference", op, expected)


@cache
def _reference(distribution: str, seed: int, offset: int, count: int) -> Tensor:
    return reference.fill((count,), torch.tensor(seed), 5, DOMAINS[distribution], offset, "cpu")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", MAKERS)
def test_dtypes_are_the_float32_numbers_rounded_once(distribution, dtype, level):
    """2^18 normals hold some ten that are subnormal in float16."""
    for seed, offset, count in ((11, 0, 2**18), (-12, 2**34 - 6001, 12001), (13, 77, 1), (14, 255, 3)):
        expected = _reference(distribution, seed, offset, count).to(dtype)
        with at_level(level):
            got = MAKERS[distribution](count, seed, stream=5, offset=offset, dtype=dtype)
        assert_same(f"{distribution} {dtype}", f"{level} = reference", got, expected)


@pytest.mark.parametrize("level", LEVELS)
def test_words_of_levels_equal_the_reference(level):
    domains = (0, 1, 2, 3, 256, 2**32 - 1)
    for number, (seed, stream, offset, count) in enumerate(noise_cases.sources(3)):
        domain = domains[number % len(domains)]
        element = torch.arange(offset, offset + count)
        with at_level(level):
            got = philox_words(count, seed, stream=stream, offset=offset, domain=domain)
        assert_same("words", f"{level} = reference", got, reference.words(element, torch.tensor(seed), stream, domain))
        assert count == 0 or 0 <= int(got.min()) <= int(got.max()) < 2**32


def test_words_of_blocks_that_wrap():
    """The op's `block` is any 64-bit pattern: block 2^64 - 1 is followed by block 0, 2^63 - 1 by 2^63."""
    for first, second in ((-1, 0), (2**63 - 1, -(2**63))):
        out = torch.empty(6, dtype=torch.int64)
        torch.ops.quaver.philox_words_(out, torch.tensor(9), 7, 1, first, 2)
        blocks = reference.words_of_blocks(torch.tensor([first, second]), torch.tensor(9), 7, 1)
        assert_same("words", "op = reference", out, blocks.flatten()[2:])


@pytest.mark.parametrize("level", LEVELS)
def test_permutations_of_levels_equal_the_reference(level):
    for count in (0, 1, 2, 3, 127, 128, 129, 1000, 12001):
        for seed, stream in ((0, 0), (-1, 2**32 - 1), (2**62 + 5, 123)):
            keys = torch.empty(count, dtype=torch.int64)
            with at_level(level):
                torch.ops.quaver.philox_keys_(keys, torch.tensor(seed), stream)
                got = philox_permutation(count, seed, stream=stream)
            assert_same("keys", f"{level} = reference", keys, reference.keys(count, torch.tensor(seed), stream, "cpu"))
            with use_backend("reference"):
                assert_same("permutations", f"{level} = reference", got, philox_permutation(count, seed, stream=stream))
            assert torch.equal(got.sort().values, torch.arange(count))


@pytest.mark.parametrize("level", LEVELS)
def test_rare_words_equal_the_reference(level):
    """In 2^26 normals: the pairs beyond 5 sigma, where u is smallest, and those of u = 1, which are zero."""
    rare = []
    with at_level(level):
        for offset in range(0, 2**26, 2**23):
            pairs = philox_normal((2**22, 2), 17, offset=offset)
            squares = pairs[:, 0] * pairs[:, 0] + pairs[:, 1] * pairs[:, 1]
            at = ((squares > 25) | (squares < 1e-5)).nonzero().flatten()
            rare.append((offset + 2 * at, pairs[at]))
    element, pairs = torch.cat([at for at, _ in rare]), torch.cat([pairs for _, pairs in rare])
    assert len(element) > 2**25 * 3e-6
    for odd in (0, 1):
        expected = reference.noise(element + odd, torch.tensor(17), 0, 0)
        assert_same("normal", f"{level} = reference", pairs[:, odd].contiguous(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("distribution, log2_count", (("normal", 24), ("uniform", 24), ("rademacher", 26)))
def test_long_runs_of_levels_equal_the_reference(distribution, log2_count):
    seed, stream, chunk = seed_for(0, f"long run of {distribution}"), 3, 2**20
    for start in range(0, 2**log2_count, chunk):
        offset = 2**34 - 2**20 - 51 + start  # odd, and across the change of the high word of a normal's counter
        expected = reference.fill((chunk,), torch.tensor(seed), stream, DOMAINS[distribution], offset, "cpu")
        for level in LEVELS:
            with at_level(level):
                got = MAKERS[distribution](chunk, seed, stream=stream, offset=offset, dtype=torch.float32)
            assert_same(distribution, f"{level} = reference", got, expected)


# ---- what the numbers are ------------------------------------------------------------------------------------------


def test_uniform_is_the_rounded_formula_for_every_word():
    top = torch.arange(2**24)
    u = reference.uniform_of_words(top << 8 | 0xA5)
    assert torch.equal(u, (top.double() * 2.0**-24 + 2.0**-25).float())
    assert (float(u.min()), float(u.max())) == (2.0**-25, 1.0)


@pytest.mark.parametrize("level", LEVELS)
def test_signs_are_the_bits_of_the_words_least_significant_first(level):
    words = philox_words(4 * 3, 21, stream=4, domain=1)
    bits = words.unsqueeze(-1) >> torch.arange(32) & 1
    with at_level(level):
        signs = philox_rademacher(3 * 128, 21, stream=4)
    assert torch.equal(signs, torch.where(bits == 1, 1.0, -1.0).flatten())


def test_normals_are_box_and_mullers_pairs_of_the_words():
    x = philox_words(4000, 22, stream=6).reshape(-1, 2)
    u, turn = (x[:, 0] >> 8).double() * 2**-24 + 2**-25, (x[:, 1] >> 8).double() * 2**-24
    radius, angle = (-2 * u.float().double().log()).sqrt(), 2 * torch.pi * turn
    expected = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten()
    assert float((philox_normal(4000, 22, stream=6).double() - expected).abs().max()) < 1.5e-6


def _digest(values: Tensor) -> str:
    return hashlib.sha256((values + 0).numpy().tobytes()).hexdigest()[:16]  # + 0 makes -0 equal 0 here too


def test_the_stream_never_changes():
    """Written down from the first version: a change here breaks every run that is recorded by its seed."""
    assert _digest(philox_normal(2**16, 1, stream=2, offset=3, dtype=torch.float32)) == "843b4afe95444e4b"
    assert _digest(philox_uniform(2**16, 1, stream=2, offset=3, dtype=torch.float32)) == "d2b1d7876505ff07"
    assert _digest(philox_rademacher(2**16, 1, stream=2, offset=3, dtype=torch.float32)) == "4f603ef22c453bad"
    assert philox_permutation(8, 1, stream=2).tolist() == [0, 3, 1, 6, 4, 7, 2, 5]


def test_permutations_are_uniform_over_the_orders():
    counts = torch.zeros(4, 4, 4, dtype=torch.int64)
    draws = 24 * 500
    for seed in range(draws):
        first, second, third, _ = philox_permutation(4, seed).tolist()
        counts[first, second, third] += 1
    orders = counts[counts > 0].double()
    assert len(orders) == 24
    statistic = float(((orders - draws / 24) ** 2).sum() / (draws / 24))
    assert chi_square_tail(statistic, 23) > IMPROBABLE


# ---- what it does not depend on ------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_an_offset_is_a_slice(maker):
    whole = maker(3000, 31, stream=1)
    for offset in (0, 1, 127, 128, 129, 1000, 2999, 3000):
        assert torch.equal(maker(3000 - offset, 31, stream=1, offset=offset), whole[offset:])
        assert torch.equal(maker((0, 5), 31, stream=1, offset=offset), torch.empty(0, 5))
    assert torch.equal(philox_words(50, 31, offset=7), philox_words(57, 31)[7:])


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_a_shape_is_row_major(maker):
    assert torch.equal(maker((3, 5, 41), 32, offset=9), maker(3 * 5 * 41, 32, offset=9).reshape(3, 5, 41))
    assert maker((), 32, offset=9).item() == maker(1, 32, offset=9).item()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_a_population_stacks_its_members(maker, dtype, level):
    seeds = torch.tensor([5, -1, 2**63 - 1, -(2**63), 5])
    with at_level(level):
        members = torch.stack([maker((7, 39), int(seed), stream=8, offset=130, dtype=dtype) for seed in seeds])
        assert torch.equal(maker((7, 39), seeds, stream=8, offset=130, dtype=dtype), members)
        # Strides of the seeds do not matter.
        assert torch.equal(
            maker((7, 39), seeds.repeat(2).reshape(2, 5).t()[:, 1], stream=8, offset=130, dtype=dtype), members
        )
        assert torch.equal(maker((7, 39), seeds[:1].expand(3), stream=8, offset=130, dtype=dtype)[2], members[0])
        assert maker((7, 39), seeds[:0], dtype=dtype).shape == (0, 7, 39)
        assert maker((7, 0), seeds, dtype=dtype).shape == (5, 7, 0)


def test_a_population_of_words_stacks_its_members():
    seeds = torch.tensor([5, -1, 2**40])
    members = torch.stack([philox_words(1001, int(seed), stream=8, offset=3) for seed in seeds])
    assert torch.equal(philox_words(1001, seeds, stream=8, offset=3), members)
    with use_backend("reference"):
        assert torch.equal(philox_words(1001, seeds, stream=8, offset=3), members)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_threads_make_the_same_bits(maker, dtype):
    """Several times the 32768 elements that a thread takes, cut at no multiple of a group; one member, and three."""
    made = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        made.append((maker(200003, 41, offset=5, dtype=dtype), maker(66667, torch.tensor([1, 2, 3]), dtype=dtype)))
    for one, three in made[1:]:
        assert_same("threads", f"{dtype}", one, made[0][0])
        assert_same("threads", f"{dtype}", three, made[0][1])


@pytest.mark.usefixtures("restored_threads")
def test_threads_make_the_same_words_and_permutations():
    made = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        made.append((philox_words(200003, torch.tensor([1, 2]), offset=5), philox_permutation(200003, 1)))
    for words, permutation in made[1:]:
        assert torch.equal(words, made[0][0])
        assert torch.equal(permutation, made[0][1])


# ---- seeds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ("cpp", "reference"))
@pytest.mark.parametrize("seed", (-1, -(2**63), 2**63, 2**64 - 1, 2**64, 2**64 + 12345, -(2**64) - 7, 2**200 + 3))
def test_int_seeds_are_taken_modulo_2_to_the_64(seed, backend):
    with use_backend(backend):
        expected = philox_normal(300, torch.tensor(_signed(seed)))
        assert torch.equal(philox_normal(300, seed), expected)
        assert torch.equal(philox_normal(300, seed % 2**64), expected)
        assert torch.equal(philox_words(30, seed), philox_words(30, _signed(seed)))
        assert torch.equal(philox_permutation(30, seed), philox_permutation(30, torch.tensor(_signed(seed))))
    assert torch.equal(torch.from_numpy(_native.noise(300, seed % 2**64)), expected)


def test_both_halves_of_the_seed_and_the_stream_matter():
    made = [philox_words(64, seed, stream=stream) for seed in (0, 1, 2**32, 2**63) for stream in (0, 1, 2**31)]
    assert len({tuple(words.tolist()) for words in made}) == len(made)


def test_seed_for_is_frozen():
    """The hash of every version and platform: blake2b of "run_seed:name", the first 8 bytes, little-endian."""
    assert seed_for(0, "a") == -1882998351095209539
    assert seed_for(-1, "decoder.layer.3.dropout") == -2759828057792175983
    assert seed_for(2**70, "") == -4480454489017778356


@pytest.mark.parametrize("seed", (seed_for(0, "a"), 2**63 - 2, -(2**63), -3))
def test_the_seed_of_a_step_wraps_as_int64_does(seed):
    """seed + step in Python and on a device counter give the same noise, also past 2^63."""
    for step in (0, 1, 5, 2**40):
        on_device = torch.tensor(seed) + torch.tensor(step)
        assert torch.equal(philox_normal(130, seed + step), philox_normal(130, on_device))


# ---- wrong calls ---------------------------------------------------------------------------------------------------

WRONG_CALLS = {
    "stream -1": (lambda: philox_normal(3, 0, stream=-1), ValueError, "stream: expected a value in [0, 2^32), got -1"),
    "stream 2^32": (lambda: philox_words(3, 0, stream=2**32), ValueError, "stream: expected a value in [0, 2^32)"),
    "stream 1.0": (lambda: philox_uniform(3, 0, stream=1.0), TypeError, "stream: expected an int, got float"),
    "offset": (lambda: philox_normal(3, 0, offset=-1), ValueError, "offset: expected a value in [0, 2^63), got -1"),
    "shape": (lambda: philox_normal((2, -3), 0), ValueError, "shape: expected sizes of 0 or more, got (2, -3)"),
    "shape 2.5": (lambda: philox_normal((2.5,), 0), TypeError, "shape: expected ints, got float"),
    "dtype": (lambda: philox_normal(3, 0, dtype=torch.int32), TypeError, "dtype: expected float64, float32, bfloat16"),
    "seed 1.0": (lambda: philox_normal(3, 1.0), TypeError, "seed: expected an int or an int64 tensor, got float"),
    "seed int32": (lambda: philox_normal(3, torch.tensor(1, dtype=torch.int32)), TypeError, "expected an int64 tensor"),
    "seed 2-d": (
        lambda: philox_normal(3, torch.zeros(2, 2).long()),
        ValueError,
        "0-dim or [P] tensor, got shape (2, 2)",
    ),
    "seeds": (lambda: philox_permutation(3, torch.tensor([1])), ValueError, "an int or a 0-dim tensor, got shape (1,)"),
    "domain": (lambda: philox_words(3, 0, domain=2**32), ValueError, "domain: expected a value in [0, 2^32)"),
    "name": (lambda: seed_for(0, 1), TypeError, "name: expected a str, got int"),
    "run_seed": (lambda: seed_for(1.0, "a"), TypeError, "run_seed: expected an int, got float"),
    "native count": (lambda: _native.noise(-1, 0), ValueError, "count must not be negative"),
    "native domain": (lambda: _native.noise(1, 0, 0, 3), ValueError, "domain must be 0, 1 or 2, or that plus 256"),
    "native level": (lambda: _native.cap_simd("v5"), ValueError, "level v5: expected base, v3, v4 or amx"),
}


@pytest.mark.parametrize("call, error, message", WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_wrong_calls_say_what_is_wrong(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)


@pytest.mark.parametrize("suffix", ["", "_triton"])
def test_opcheck(suffix: str) -> None:
    seed = torch.tensor(3)
    opcheck(getattr(torch.ops.quaver, f"philox_fill_{suffix}").default, (torch.zeros(7), seed, 1, 0, 5))
    words = torch.zeros(7, dtype=torch.int64)
    opcheck(getattr(torch.ops.quaver, f"philox_words_{suffix}").default, (words, seed, 1, 0, 5, 2))
    opcheck(getattr(torch.ops.quaver, f"philox_keys_{suffix}").default, (words.clone(), seed, 1))


def test_compiles() -> None:
    compiled = torch.compile(lambda x: x + quaver.philox_normal((3, 5), 7), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(torch.zeros(3, 5)), quaver.philox_normal((3, 5), 7))


def test_compiles_with_inductor() -> None:
    compiled = torch.compile(lambda x: x + quaver.philox_uniform((3, 5), 7), fullgraph=True)
    assert torch.equal(compiled(torch.zeros(3, 5)), quaver.philox_uniform((3, 5), 7))


def test_only_the_chosen_kernels_run() -> None:
    names = op_checks.dispatched(lambda: quaver.philox_normal((3, 5), 7))
    op_checks.assert_only(names, "cpp")
    assert [name for name in names if name.startswith("quaver::")] == ["quaver::philox_fill_"]
