"""Contract: the package's noise passes the tests of experiments/randomness, known-bad noise fails those that are meant for
it, and each statistic is what it is said to be.

A p-value below `LEVEL` rejects. A run takes 29 of them for each element type, so noise that is what it should be would be
rejected with a probability below 1e-9.
"""

import contextlib
import itertools
import tempfile
from pathlib import Path

import pytest
import torch

from experiments.randomness import battery, kinds, rounding, uniformity
from experiments.randomness import run as randomness
from experiments.randomness.plan import PAIR_TESTS, RELATIONS, TESTS, Sizes, make_plan, related
from experiments.randomness.sources import BEYOND_STATISTICS, BROKEN, Source, bits_of, broken
from neft_kernels.ops import reference
from neft_kernels.ops.registration import OVERLOADS
from neft_kernels.ops.seed import draw_seed

SIZES = Sizes(steps=1, tokens=1024, columns=640, pairs=64, pair_tokens=16, pair_columns=64)
LEVEL = 1e-9 / (len(TESTS) + len(RELATIONS) * len(PAIR_TESTS))
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def rejected(source, dtype):
    results = randomness.run_plan(source, make_plan(SIZES, seed=7, dtypes=(dtype,)))
    return {result["test"] for result in results if result["p"] < LEVEL}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_noise_passes(dtype):
    assert rejected(Source(), dtype) == set()


CAUGHT_BY = {
    "three-rounds": {"distribution", "spectrum", "correlation at any shift", "next step: same place"},
    "low-half-twice": {"neighbouring columns", "correlation of columns", "spectrum", "correlation at any shift"},
    "token-high-word": {f"token + 2**32: {test}" for test in PAIR_TESTS},
    "seed-high-word": {f"seed bit: {test}" for test in PAIR_TESTS},
    "stream-shifts-tokens": {"next stream: any shift"},
    "stuck-bit": {"all values"},
    "no-key-schedule": set(),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bad_noise_fails_the_tests_that_are_meant_for_it(name):
    with broken(name) as source:
        found = rejected(source, torch.bfloat16)
    assert found >= CAUGHT_BY[name]
    assert bool(found) == (name not in BEYOND_STATISTICS)
    assert reference.PHILOX_ROUNDS == 10  # mended


def test_what_runs_is_what_was_planned():
    plan = make_plan(SIZES, seed=7, dtypes=(torch.bfloat16,))
    del plan["tests"]["kurtosis"]
    with pytest.raises(AssertionError, match="planned"):
        randomness.run_plan(Source(), plan)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_levels_are_the_noise_to_the_last_bit(dtype):
    seed, stream, first_token = -(2**40) - 3, 5, 2**33 - 2
    levels = Source().levels((5, 67), dtype, seed, stream, first_token)
    u = reference.uniform(first_token + torch.arange(5), 67, dtype, torch.tensor([seed]), stream)
    assert torch.equal(torch.from_numpy(uniformity.values(bits_of(dtype)))[levels], u.double())


def test_related_noise_is_what_its_name_says():
    def of(pair):
        return [(identity["seed"] % 2**64, identity.get("stream"), identity.get("first_token")) for identity in pair]

    torch.manual_seed(3)
    found = {relation: [of(pair) for pair in pairs] for relation, pairs in related(SIZES)}
    assert found.keys() == RELATIONS.keys()
    assert all((after[0] - before[0]) % 2**64 == 1 for before, after in found["seed + 1"])
    assert [before[0] ^ after[0] for before, after in found["seed bit"]] == [1 << bit for bit in range(64)]
    assert all(this[1] == following[0] for this, following in itertools.pairwise(found["next step"]))
    assert all(a[0] == b[0] and (a[1], b[1]) == (r, r + 1) for r, (a, b) in enumerate(found["next stream"]))
    assert all(a[0] == b[0] and (a[2], b[2]) == (None, 2**32) for a, b in found["token + 2**32"])


def test_seeds_are_those_that_the_package_draws():
    torch.manual_seed(5)
    seeds = battery.draw_seeds(3)
    torch.manual_seed(5)
    out = [
        OVERLOADS["add_noise"]["reference"](torch.zeros(2, 8), draw_seed(torch.device("cpu")), None, 1.0, 0, 0)
        for _ in seeds
    ]
    for seed, noise in zip(seeds, out, strict=True):
        assert torch.equal(noise, reference.uniform(torch.arange(2), 8, torch.float32, torch.tensor([seed])))


# --- sign and gaussian noise -----------------------------------------------------------------------------------------

SMALL_KINDS = Sizes(steps=1, tokens=512, columns=512, pairs=64, pair_tokens=8, pair_columns=64)


def rejected_kinds(source):
    plan = kinds.make_plan(SMALL_KINDS, seed=7) | {"types": ["bfloat16"]}
    results = kinds.run_plan(source, plan, SMALL_KINDS)
    return {result["test"] for result in results if result["p"] < LEVEL}


def test_sign_and_gaussian_noise_pass():
    assert rejected_kinds(kinds.Source()) == set()


@pytest.mark.parametrize(
    ("name", "caught_by"),
    [
        ("stream-shifts-tokens", {"sign, next stream: any shift", "gaussian, next stream: any shift"}),
        (kinds.WITHOUT_TAIL, {"gaussian, kurtosis"}),
    ],
)
def test_bad_sign_and_gaussian_noise_fails(name, caught_by):
    with kinds.known_bad(name) as source:
        assert rejected_kinds(source) >= caught_by


def test_signs_make_patterns():
    """The sign of the first column of sixteen is the lowest bit."""
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0] + 12 * [-1.0] + 16 * [1.0])[None]
    assert kinds.pattern(signs).tolist() == [[9, 2**16 - 1]]


@pytest.mark.parametrize("bits", [16, 23])
def test_cells_of_gaussian_noise_are_equally_likely(bits):
    cells = torch.bucketize(kinds.gaussian_values(bits), kinds.borders(bits))
    assert (cells.bincount() == 2**bits // kinds.CELLS).all()


# --- the battery, and rounding ---------------------------------------------------------------------------------------


def test_the_battery_gets_the_words_of_the_reference():
    torch.manual_seed(0)
    seeds = [*battery.draw_seeds(2), -1]
    with tempfile.TemporaryDirectory() as folder:
        program = battery.build(Path(folder))
        battery.verify(program, seeds)
        with battery.streaming(program, seeds) as words, pytest.MonkeyPatch.context() as patch:
            patch.setattr(battery, "streaming", lambda *_: contextlib.nullcontext(words))
            with pytest.raises(AssertionError, match="differs"):
                battery.verify(program, [seeds[0], seeds[2]])


def test_dieharder_is_parsed():
    output = """#====#
      diehard_operm5|   0|   1000000|     100|0.99540846|   WEAK
          sts_serial|  16|    100000|     100|0.00000001|  FAILED
        # a remark | with | bars | in | it | too
"""
    assert battery.parse(output) == [
        {"test": "diehard_operm5", "ntuple": 0, "tsamples": 10**6, "psamples": 100, "p": 0.99540846, "verdict": "WEAK"},
        {"test": "sts_serial", "ntuple": 16, "tsamples": 10**5, "psamples": 100, "p": 1e-8, "verdict": "FAILED"},
    ]


def test_the_battery_says_what_is_missing(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="apt-get install dieharder"):
        battery.run()


def test_what_is_left_of_noise():
    rows = torch.randn(64, 64).bfloat16()
    noise = (torch.rand(64, 64) * 2 - 1) * 0.5
    nothing = rounding.compare(rows, rows, noise, 0.5)
    assert (nothing["changed"], nothing["deviation"], nothing["correlation"]) == (0, 0, 0)
    everything = rounding.compare(rows.float(), rows.float() + noise, noise, 0.5)
    assert everything["changed"] > 0.99
    assert everything["correlation"] == pytest.approx(1, abs=1e-6)
    assert everything["deviation"] == pytest.approx(float(noise.square().mean()) ** 0.5 / (0.5 / 3**0.5), rel=1e-4)
    assert everything["mean"] == pytest.approx(float(noise.mean()) / 0.5, abs=1e-6)


@pytest.mark.parametrize("dtype", rounding.DTYPES, ids=str)
def test_large_embeddings_round_noise_away(dtype):
    """Below half a unit in the last place nothing changes; of rows near 0 everything does. `measure` checks both sums."""
    large, small = (torch.full((rounding.NUM_EMBEDDINGS, rounding.WIDTH), value, dtype=dtype) for value in (1.5, 0.0))
    for cell in rounding.measure(large, 1024):
        expected = 0 if dtype == torch.bfloat16 else pytest.approx(1 - 2**-11 / rounding.magnitude_of(1024), abs=0.01)
        assert cell["changed"] == expected
    for cell in rounding.measure(small, 1024):
        assert cell["changed"] == pytest.approx(1, abs=1e-3)
        assert cell["correlation"] == pytest.approx(1, abs=1e-4)
