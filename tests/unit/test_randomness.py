"""Streams of random numbers: fixed by seed, purpose and position, and by nothing else."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_ray.training.randomness import Purpose, key, random_stream

# A run continued with other keys is another run: these numbers never change.
GOLDEN = {
    (0, "initialisation"): 0x45A91497CEFCE1C76BE2452461349872,
    (0, "latent"): 0x6FE3B69C05160083F08E0393BC855512,
    (0, "discriminator-augment-real"): 0x096D3B8C7E6512E115C607BC5C10C2FB,
    (0, "discriminator-augment-fake"): 0x1C3DA1621430B34289FE6EA0EF724120,
    (0, "generator-augment-real"): 0x9C09D1B051D93EA289B61D4B1129A953,
    (0, "generator-augment-fake"): 0x8C98E39BCD405449C3A01E33540CC27A,
    (0, "penalty-real"): 0x8CEF1BCD752817EEF669EABF0E11CCEC,
    (0, "penalty-fake"): 0x1F7CF1DA76287D758D8A1C5D7E9F37BE,
    (0, "shard-order"): 0xCAE4FD2F7FA45420F25D2AC294493186,
    (0, "sample-order"): 0xAA526BC546F7D53097E54C7BDA555B20,
    (0, "sample-latent"): 0x3DF7D15086AE6AD4D7C9E0CA8C7B2BDC,
    (0, "preparation"): 0x6BAF422A95D1DDCA78E0A425E7F3B3B5,
    (0, "latent", 0): 0xC35CF97E9A986C0F8914E4B25E5D0745,
    (0, "latent", 1): 0xDE3262737A6C9B36656344F61865ED6B,
    (1, "latent", 0): 0x66E19BC57C53AEF6749F4518852B8366,
    (7, "penalty-real", 3, 12): 0x8185F644C5176BB43C9FEF6D58B6BF5A,
    (7, "penalty-real", 31, 2): 0x01E6C7D33A0E98FAC28A8FACF0154F0E,
    (2**40, "sample-order", 2, 150_000, 511): 0x1EF216BAA4589382EADDDA8898E121E6,
}
few = settings(max_examples=50, deadline=None, derandomize=True)
places = st.tuples(
    st.integers(0, 2**63),
    st.sampled_from(Purpose),
    st.lists(st.integers(0, 2**40), max_size=4).map(tuple),
)


@pytest.mark.parametrize("place", GOLDEN)
def test_a_key_never_changes(place):
    seed, purpose, *position = place
    assert key(seed, Purpose(purpose), *position) == GOLDEN[place]


def test_a_streams_first_numbers_never_change():
    stream = random_stream(0, Purpose.LATENT, 0)
    uniform = [0.7347543357380927, 0.39124559293956596, 0.7997015348273488]
    assert stream.random(3).tolist() == pytest.approx(uniform, abs=1e-12)


def test_purposes_seeds_and_positions_all_have_keys_and_streams_of_their_own():
    positions = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (10,), (1, 0, 0)]
    cases = list(product(range(3), Purpose, positions))
    keys = {key(seed, purpose, *position) for seed, purpose, position in cases}
    assert len(keys) == len(cases)
    streams = {
        tuple(random_stream(seed, purpose, *position).random(4).tolist())
        for seed, purpose, position in cases
    }
    assert len(streams) == len(cases)


@few
@given(places, places)
def test_two_places_share_a_key_only_if_they_are_the_same_place(one, other):
    keys = [key(seed, purpose, *position) for seed, purpose, position in (one, other)]
    assert (keys[0] == keys[1]) == (one == other)
    assert all(0 <= k < 2**128 for k in keys)


def test_a_stream_follows_from_the_whole_key():
    """PyTorch's CPU generator keeps 32 bits of its seed: these two keys once shared them."""
    first, second = (
        random_stream(0, Purpose.SAMPLE_LATENT, index).random(4) for index in (3_241, 94_885)
    )
    assert not (first == second).any()
    streams = {random_stream(0, Purpose.SAMPLE_LATENT, index).random() for index in range(100_000)}
    assert len(streams) == 100_000


@pytest.mark.parametrize(("one", "other"), [((1, 23), (12, 3)), ((1,), (1, 0)), ((2, 1), (1, 2))])
def test_positions_do_not_run_together(one, other):
    assert key(0, Purpose.LATENT, *one) != key(0, Purpose.LATENT, *other)


def test_a_stream_does_not_depend_on_what_was_drawn_before():
    places = [(seed, purpose, 5) for seed in range(2) for purpose in Purpose]

    def first_numbers(order: list) -> dict:
        return {place: random_stream(*place).standard_normal(3).tolist() for place in order}

    torch.manual_seed(0)
    forwards = first_numbers(places)
    torch.manual_seed(1)
    torch.rand(7)
    assert first_numbers(places[::-1]) == forwards


def test_two_streams_of_one_place_are_equal_and_apart():
    first, second = (random_stream(3, Purpose.PREPARATION, 1) for _ in range(2))
    ahead = first.random(4)
    first.random(4)
    assert (second.random(4) == ahead).all()


def test_a_stream_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    random_stream(0, Purpose.LATENT).random(4)
    assert torch.equal(torch.get_rng_state(), before)
