"""Images in ADM's format: written in parts, read by numpy, and the other way round."""

import io
import itertools
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_ray.errors import BadInput, ExpectedError
from cat_ray.evaluation.npz import IMAGES, LABELS, Npz, write_images

SHAPE = (10, 4, 4, 3)


def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)


def written(sizes: list[int], labels: np.ndarray | None = None) -> bytes:
    target = io.BytesIO()
    cuts = list(itertools.accumulate(sizes))[:-1]
    labels = np.arange(10) if labels is None else labels
    write_images(target, SHAPE, np.split(images(), cuts), labels)
    return target.getvalue()


def opened(content: bytes) -> Npz:
    return Npz(io.BytesIO(content), "samples.npz")


def saved(**arrays: np.ndarray) -> bytes:
    target = io.BytesIO()
    np.savez(target, **arrays)
    return target.getvalue()


def test_numpy_opens_what_was_written_in_parts():
    found = np.load(io.BytesIO(written([3, 1, 6])))
    assert found.files == [IMAGES, LABELS]
    assert found[IMAGES].dtype == np.uint8
    np.testing.assert_array_equal(found[IMAGES], images())
    np.testing.assert_array_equal(found[LABELS], np.arange(10))


def test_the_bytes_do_not_depend_on_the_parts():
    assert written([10]) == written([1] * 10) == written([4, 6])


def test_a_target_needs_no_seeking():
    class Pipe(io.RawIOBase):
        content = b""

        def writable(self) -> bool:
            return True

        def write(self, piece) -> int:
            self.content += bytes(piece)
            return len(bytes(piece))

    pipe = Pipe()
    write_images(pipe, SHAPE, [images()], np.arange(10))
    np.testing.assert_array_equal(np.load(io.BytesIO(pipe.content))[IMAGES], images())


def test_the_number_of_images_must_be_the_one_that_was_said():
    with pytest.raises(AssertionError, match="9 images came, not 10"):
        write_images(io.BytesIO(), SHAPE, [images()[:9]], np.arange(10))


@pytest.mark.parametrize("save", [saved, lambda **arrays: written([10])])
@pytest.mark.parametrize("count", [1, 3, 10, 100])
def test_rows_come_a_few_at_a_time(save, count):
    npz = opened(save(arr_0=images(), arr_1=np.arange(10)))
    parts = list(npz.rows(IMAGES, count))
    assert {len(part) for part in parts[:-1]} <= {count}
    np.testing.assert_array_equal(np.concatenate(parts), images())
    np.testing.assert_array_equal(npz.read(LABELS), np.arange(10))


@pytest.mark.parametrize("shape", [(0, 3), (1,), (5, 0), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_arrays_of_numpy_come_as_they_are(shape, dtype):
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    npz = opened(saved(array=array))
    assert "array" in npz and "other" not in npz
    found = npz.read("array")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, array)


def test_a_compressed_file_is_read_as_well():
    target = io.BytesIO()
    np.savez_compressed(target, arr_0=images())
    np.testing.assert_array_equal(opened(target.getvalue()).read(IMAGES), images())


# What is no such file.


@pytest.mark.parametrize("content", [b"", b"hello", b"something else"])
def test_something_else_is_no_npz(content):
    with pytest.raises(BadInput, match=r"samples\.npz is no npz file"):
        opened(content)


OBJECTS = np.asarray([{}], dtype=object)


@pytest.mark.parametrize("array", [OBJECTS, np.asarray(["cat"]), np.zeros(2, [("a", "u1")])])
def test_what_is_no_plain_numbers_is_refused_where_it_is_asked_for(array):
    npz = opened(saved(array=array, other=np.arange(3)))
    for ask in (npz.known, npz.read, lambda name: list(npz.rows(name, 1))):
        with pytest.raises(BadInput, match=r"array\.npy holds no plain numbers"):
            ask("array")
    np.testing.assert_array_equal(npz.read("other"), np.arange(3))


@pytest.mark.parametrize("array", [np.asfortranarray(np.arange(12).reshape(3, 4)), np.asarray(3.0)])
def test_numbers_in_fortrans_order_and_single_ones_are_read_whole_but_not_row_by_row(array):
    npz = opened(saved(array=array))
    np.testing.assert_array_equal(npz.read("array"), array)
    with pytest.raises(BadInput, match="array doesn't lie row after row: save it as"):
        list(npz.rows("array", 1))


def test_a_member_that_is_no_array_matters_only_to_who_asks_for_it():
    target = io.BytesIO(saved(mu=np.arange(3)))
    with zipfile.ZipFile(target, "a") as archive:
        archive.writestr("readme.txt", "hello")
        archive.writestr("text.npy", "hello")
    npz = opened(target.getvalue())
    np.testing.assert_array_equal(npz.read("mu"), np.arange(3))
    for name, told in (("readme.txt", r"readme\.txt"), ("text", r"text\.npy")):
        with pytest.raises(BadInput, match=f"{told} is no array of numpy's"):
            npz.read(name)


def test_an_array_that_is_not_there_is_told_with_those_that_are():
    with pytest.raises(BadInput, match=r"samples\.npz has no mu, it has arr_0, arr_1"):
        opened(written([10])).read("mu")


# In the pixels, and in the text of the header.
@pytest.mark.parametrize("place", [400, 80])
def test_a_damaged_array_is_told(place):
    content = bytearray(written([10]))
    content[place] ^= 1
    with pytest.raises(BadInput, match=r"arr_0\.npy is damaged"):
        opened(bytes(content)).read(IMAGES)


def read_all(content: bytes) -> None:
    """Only our own errors may come out of a file, whatever is in it."""
    try:
        npz = opened(content)
        for name in (IMAGES, LABELS):
            if name in npz:
                npz.known(name)
                list(npz.rows(name, 3))
                npz.read(name)
    except ExpectedError as error:
        assert "samples.npz" in str(error)


def compressed() -> bytes:
    target = io.BytesIO()
    np.savez_compressed(target, arr_0=images(), arr_1=np.arange(10))
    return target.getvalue()


VALID = (written([10]), saved(arr_0=images(), arr_1=np.arange(10)), compressed())
changed_bytes = st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), max_size=4)
damaged = st.tuples(st.sampled_from(VALID), changed_bytes, st.none() | st.integers(0, 2**20))


def check_damaged(case: tuple[bytes, list[tuple[int, int]], int | None]) -> None:
    valid, changes, length = case
    content = bytearray(valid)
    for place, value in changes:
        content[place % len(content)] = value
    read_all(bytes(content[: None if length is None else length % len(content)]))


@settings(max_examples=200, deadline=None)
@given(damaged)
def test_whatever_is_changed_in_a_file_only_our_own_errors_come_out(case):
    check_damaged(case)


@pytest.mark.long
@settings(max_examples=10_000, deadline=None)
@given(damaged)
def test_whatever_is_changed_in_ten_thousand_files_only_our_own_errors_come_out(case):
    check_damaged(case)
