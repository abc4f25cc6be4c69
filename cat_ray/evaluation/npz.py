"""Images in ADM's format: an uncompressed npz whose `arr_0` is `[N, H, W, 3]` uint8.

50,000 images of 256 pixels are 9.8 GB: they are written and read a few at a time.
"""

import lzma
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from cat_ray.errors import BadInput, Damaged

IMAGES = "arr_0"
LABELS = "arr_1"
ENDING = ".npy"
# Of every member, so that the same images give the same bytes.
WRITTEN = (1980, 1, 1, 0, 0, 0)
NUMBERS = "biuf"
# What the zipfile module raises for a damaged or encrypted file, or a compression that is rare.
UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
    struct.error,
)
HEADER_UNREADABLE = (ValueError, KeyError, TypeError, SyntaxError, tokenize.TokenError)


def write_images(
    target: IO[bytes], shape: tuple[int, ...], parts: Iterable[np.ndarray], labels: np.ndarray
) -> None:
    """Writes images as they come, then their labels.

    Args:
        target: a file open for writing; it needn't be one that can seek.
        shape: of all images, `[N, H, W, 3]`.
        parts: uint8, N in all.
        labels: `[N]`.
    """
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        with _member(archive, IMAGES) as file:
            _write_header(file, shape, np.dtype(np.uint8))
            written = 0
            for part in parts:
                assert part.dtype == np.uint8 and part.shape[1:] == shape[1:]
                file.write(np.ascontiguousarray(part).data)
                written += len(part)
            assert written == shape[0], f"{written} images came, not {shape[0]}"
        with _member(archive, LABELS) as file:
            _write_header(file, labels.shape, labels.dtype)
            file.write(np.ascontiguousarray(labels).data)


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    return archive.open(zipfile.ZipInfo(f"{name}{ENDING}", WRITTEN), "w", force_zip64=True)


def _write_header(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> None:
    fields = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(file, fields)


@dataclass(frozen=True)
class Array:
    """An array of an npz as its header tells; `by_column` is Fortran's order."""

    shape: tuple[int, ...]
    dtype: np.dtype
    by_column: bool = False


class Npz:
    """The arrays of an npz, whole or a few rows at a time; nothing in it is unpickled.

    What else the file holds beside the arrays that are asked for doesn't matter.
    """

    def __init__(self, file: IO[bytes], name: str):
        """Looks at the list of members of a file that can seek; `name` is for messages.

        Raises:
            BadInput: it is no npz.
        """
        self.name = name
        try:
            self._archive = zipfile.ZipFile(file)
        # In a file of a few bytes the search begins before its first one, which pyarrow refuses.
        except UNREADABLE as error:
            raise Damaged(f"{name} is no npz file: {error}") from error
        self._names = {member.removesuffix(ENDING) for member in self._archive.namelist()}

    @contextmanager
    def _opened(self, array: str) -> Iterator[tuple[Array, IO[bytes]]]:
        """The header of an array, and what comes behind it."""
        if array not in self._names:
            raise BadInput(f"{self.name} has no {array}, it has {', '.join(sorted(self._names))}")
        member = f"{array}{ENDING}"
        if member not in self._archive.namelist():
            raise BadInput(f"{self.name}: {array} is no array of numpy's")
        try:
            with self._archive.open(member) as content:
                yield self._header(content, member), content
        except UNREADABLE as error:
            raise Damaged(f"{self.name}: {member} is damaged: {error}") from error

    def _header(self, content: IO[bytes], member: str) -> Array:
        try:
            version = npy.read_magic(content)
            read: Any = {
                (1, 0): npy.read_array_header_1_0,
                (2, 0): npy.read_array_header_2_0,
            }[version]
            shape, by_column, dtype = read(content)
        except HEADER_UNREADABLE as error:
            raise BadInput(f"{self.name}: {member} is no array of numpy's") from error
        if dtype.kind not in NUMBERS or not dtype.itemsize or not all(n >= 0 for n in shape):
            raise BadInput(f"{self.name}: {member} holds no plain numbers, but {dtype}")
        return Array(shape, dtype, by_column)

    def __contains__(self, array: str) -> bool:
        return array in self._names

    def read(self, array: str) -> np.ndarray:
        """A whole array.

        Raises:
            BadInput: there is none of that name, it holds no numbers, or it is cut short.
        """
        with self._opened(array) as (found, content):
            wanted = math.prod(found.shape) * found.dtype.itemsize
            read = content.read(wanted)
            if len(read) < wanted:
                raise Damaged(f"{self.name}: {array} ends before its last row")
            flat = np.frombuffer(read, found.dtype)
            return flat.reshape(found.shape, order="F" if found.by_column else "C")

    def rows(self, array: str, count: int, first: int = 0) -> Iterator[np.ndarray]:
        """An array from its row `first` on, so many rows at a time.

        Raises:
            BadInput: there is none of that name, it has no rows, or it is cut short.
        """
        with self._opened(array) as (found, content):
            if found.by_column or not found.shape:
                raise BadInput(
                    f"{self.name}: {array} doesn't lie row after row: save it as "
                    "numpy.ascontiguousarray gives it"
                )
            row_bytes = math.prod(found.shape[1:]) * found.dtype.itemsize
            content.seek(first * row_bytes, os.SEEK_CUR)
            for begin in range(first, found.shape[0], count):
                rows = min(count, found.shape[0] - begin)
                read = content.read(rows * row_bytes)
                if len(read) < rows * row_bytes:
                    raise Damaged(f"{self.name}: {array} ends before row {begin + rows}")
                yield np.frombuffer(read, found.dtype).reshape(rows, *found.shape[1:])

    def known(self, array: str) -> Array:
        """The header of an array.

        Raises:
            BadInput: there is none of that name, or it holds no numbers.
        """
        with self._opened(array) as (found, _):
            return found
