"""Streams of random numbers: fixed by seed, purpose and position, and by nothing else."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_ray.training.randomness import Purpose, generator, key

# A run continued with other keys is another run: these numbers never change.
GOLDEN = {
    (0, "initialisation"): 7508915689380802204,
    (0, "latent"): 9159332406894046029,
    (0, "discriminator-augment-real"): 8694656369460696072,
    (0, "discriminator-augment-fake"): 606094422644777514,
    (0, "generator-augment-real"): 3767529127715574109,
    (0, "generator-augment-fake"): 9180819135008289734,
    (0, "penalty-real"): 2413132805231473451,
    (0, "penalty-fake"): 8193405812368385454,
    (0, "shard-order"): 5400594333723069247,
    (0, "sample-order"): 7448382830675105729,
    (0, "sample-latent"): 2037338296278681148,
    (0, "evaluation"): 8687514966687116943,
    (0, "preparation"): 360863003953397553,
    (0, "latent", 0): 7359575995455459694,
    (0, "latent", 1): 3547817614485308416,
    (1, "latent", 0): 8535897505335490486,
    (7, "penalty-real", 3, 12): 1190745214547724547,
    (7, "penalty-real", 31, 2): 7756297163862737352,
    (2**40, "sample-order", 2, 150_000, 511): 3108936730001355783,
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
    stream = generator(0, Purpose.LATENT, 0)
    uniform = [0.5942146182060242, 0.23993057012557983, 0.7309057116508484]
    assert torch.rand(3, generator=stream).tolist() == pytest.approx(uniform, abs=1e-7)


def test_purposes_seeds_and_positions_all_have_keys_and_streams_of_their_own():
    positions = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (10,), (1, 0, 0)]
    cases = list(product(range(3), Purpose, positions))
    keys = {key(seed, purpose, *position) for seed, purpose, position in cases}
    assert len(keys) == len(cases)
    streams = {
        tuple(torch.rand(4, generator=generator(seed, purpose, *position)).tolist())
        for seed, purpose, position in cases
    }
    assert len(streams) == len(cases)


@few
@given(places, places)
def test_two_places_share_a_key_only_if_they_are_the_same_place(one, other):
    keys = [key(seed, purpose, *position) for seed, purpose, position in (one, other)]
    assert (keys[0] == keys[1]) == (one == other)
    assert all(0 <= k < 2**63 for k in keys)


@pytest.mark.xfail(strict=True, reason="torch's CPU generator keeps 32 of the key's 63 bits")
def test_keys_that_differ_in_their_upper_half_alone_give_different_streams():
    one, other = ((0, Purpose.SAMPLE_LATENT, index) for index in (3_241, 94_885))
    assert key(*one) != key(*other)
    assert (key(*one) - key(*other)) % 2**32 == 0
    first, second = (torch.rand(4, generator=generator(*place)) for place in (one, other))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("one", "other"), [((1, 23), (12, 3)), ((1,), (1, 0)), ((2, 1), (1, 2))])
def test_positions_do_not_run_together(one, other):
    assert key(0, Purpose.LATENT, *one) != key(0, Purpose.LATENT, *other)


def test_a_stream_does_not_depend_on_what_was_drawn_before():
    places = [(seed, purpose, 5) for seed in range(2) for purpose in Purpose]

    def first_numbers(order: list) -> dict:
        return {place: torch.randn(3, generator=generator(*place)).tolist() for place in order}

    torch.manual_seed(0)
    forwards = first_numbers(places)
    torch.manual_seed(1)
    torch.rand(7)
    assert first_numbers(places[::-1]) == forwards


def test_two_generators_of_one_place_are_equal_and_apart():
    first, second = generator(3, Purpose.EVALUATION, 1), generator(3, Purpose.EVALUATION, 1)
    ahead = torch.rand(4, generator=first)
    torch.rand(4, generator=first)
    assert torch.equal(torch.rand(4, generator=second), ahead)


def test_a_stream_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    torch.rand(4, generator=generator(0, Purpose.LATENT))
    assert torch.equal(torch.get_rng_state(), before)


def test_streams_are_made_on_the_cpu():
    assert generator(0, Purpose.LATENT).device.type == "cpu"
