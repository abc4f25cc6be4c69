"""Local paths and object stores behind one small type: the only place that knows endpoints."""

import io
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, TypeVar

from pyarrow import NativeFile, fs

from cat_ray.errors import BadInput, Damaged, NotFound, StorageDown
from cat_ray.storage_errors import explain, retry
from cat_ray.uris import Endpoint, Place, endpoint_of, expanded, place_of

CONNECT_SECONDS = 5.0
# Without a byte; with all attempts it is how late an outage may be noticed at all.
REQUEST_SECONDS = 20.0
ATTEMPTS = 3
OPEN_FILES = 256
BUFFER_BYTES = 4 << 20
PIECE_BYTES = 32 << 20
MARK_BYTES = 16
T = TypeVar("T")

# Servers other than AWS refuse the checksum trailers that the AWS SDK would send. Uploads and
# downloads are verified by our own hashes.
ENVIRONMENT = {"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)


@dataclass(frozen=True)
class Location:
    """A file or folder on a filesystem. `location / "name"` is one below it.

    Every method raises `StorageDown` where the storage still doesn't answer after `retry_seconds`,
    `StorageFull` where it has no space left, and `BadInput` for what a retry cannot fix.

    Attributes:
        filesystem: Arrow's.
        path: on it.
        uri: as a person writes it.
        retry_seconds: for how long every operation is retried while the storage is down.
    """

    filesystem: fs.FileSystem
    path: str
    uri: str
    retry_seconds: float = 0.0

    def __hash__(self) -> int:
        # Arrow's filesystems can be compared, but not hashed.
        return hash((self.path, self.uri))

    def __truediv__(self, name: str) -> "Location":
        return replace(self, path=f"{self.path}/{name}", uri=f"{self.uri.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def parent(self) -> "Location | None":
        """The folder that it lies in; None for a bucket, and for the root of a disk."""
        above, _, name = self.path.rpartition("/")
        return replace(self, path=above, uri=self.uri[: -len(name) - 1]) if above else None

    @property
    def local_path(self) -> Path | None:
        """The path on this machine, or None for an object store."""
        return Path(self.path) if isinstance(self.filesystem, fs.LocalFileSystem) else None

    def retried(self, seconds: float) -> "Location":
        """The same place, asked for so long while its storage is down."""
        return replace(self, retry_seconds=seconds)

    def size(self) -> int | None:
        """Bytes of the file, or None if there is none."""
        info = self._look(lambda info: info.type == fs.FileType.File and not info.size)
        return info.size if info.type == fs.FileType.File else None

    def modified(self) -> float | None:
        """Unix time of the file's last change, or None if there is none."""
        info = self._ask(lambda: self.filesystem.get_file_info(self.path))
        return info.mtime_ns / 1e9 if info.type == fs.FileType.File else None

    def exists(self) -> bool:
        """Whether there is a file here."""
        return self.size() is not None

    def is_folder(self) -> bool:
        """Whether there is a folder here; on an object store, anything below."""
        info = self._look(lambda info: info.type == fs.FileType.NotFound)
        return info.type == fs.FileType.Directory

    def read(self) -> bytes:
        """The file's bytes.

        Raises:
            NotFound: there is no such file.
        """

        def read() -> bytes:
            for _ in range(ATTEMPTS):
                with self._open_once() as file:
                    size = file.size()
                    content = file.read() if self.local_path else self._pieces(file, size)
                if len(content) < size:
                    raise StorageDown(f"{self.uri}: {len(content)} of {size} bytes were sent")
                # Of a file that was replaced by a longer one since Arrow asked for its size, this
                # is the beginning.
                if self.local_path or self.filesystem.get_file_info(self.path).size == size:
                    return content
            raise StorageDown(f"{self.uri} changed each time while it was read")

        return self._ask(lambda: self._surely(read, lambda content: not content))

    def read_range(self, begin: int, end: int) -> bytes:
        """Some of the file's bytes. The file is held open, so that it must not change.

        Raises:
            NotFound: there is no such file.
            BadInput: it ends before.
        """

        def read() -> bytes:
            file = _opened(self, threading.get_ident())
            content = bytearray(max(0, min(end, file.size()) - begin))
            self._read_into(file, begin, content)
            return bytes(content)

        content = self._ask(read)
        if len(content) < end - begin:
            raise BadInput(f"{self.uri} ends at byte {begin + len(content)}, before {end}")
        return content

    @contextmanager
    def opened(self) -> Iterator[IO[bytes]]:
        """The file, for those who want to seek in it; each read is retried."""
        with (
            self._ask(self._open) as file,
            io.BufferedReader(_Retried(self, file), BUFFER_BYTES) as buffered,
        ):
            yield buffered

    def files_below(self) -> dict[str, int]:
        """Path from here and bytes of each file below, at any depth."""
        found = self._listed(recursive=True)
        start = len(self.path.rstrip("/")) + 1
        return {info.path[start:]: info.size for info in found if info.type == fs.FileType.File}

    def write(self, content: bytes) -> None:
        """Puts a whole file in place at once: a reader finds the old one or the new one."""

        def write() -> None:
            with self._put_in_place() as target:
                if self.local_path is not None:
                    Path(target).write_bytes(content)
                    return
                with self.filesystem.open_output_stream(target) as file:
                    file.write(content)

        self._ask(write)

    @contextmanager
    def written(self) -> Iterator[NativeFile]:
        """A file to be written piece by piece; on a local disk it is in place once it is whole.

        What is written can't be written again: nothing is retried. If the block fails, there is no
        file in an object store.
        """
        try:
            with (
                self._explained(),
                self._put_in_place() as target,
                self.filesystem.open_output_stream(target) as file,
            ):
                yield file
        except BaseException:
            if self.local_path is None:
                # Arrow completes the upload even so.
                self.delete()
            raise

    def upload(self, source: Path) -> None:
        """Copies a local file here, in pieces; in place at once, as `write`."""

        def upload() -> None:
            # Not Arrow's `copy_files`: it says nothing where the last requests of an upload fail.
            with (
                source.open("rb") as content,
                self._put_in_place() as target,
                self.filesystem.open_output_stream(target) as file,
            ):
                shutil.copyfileobj(content, file, BUFFER_BYTES)

        self._ask(upload)

    @contextmanager
    def _put_in_place(self) -> Iterator[str]:
        """Where to write to: on a local disk beside the file, which it becomes at the end."""
        local = self.local_path
        if local is None:
            yield self.path
            return
        local.parent.mkdir(parents=True, exist_ok=True)
        partial = local.with_name(f".{local.name}.partial")
        try:
            yield str(partial)
            partial.replace(local)
        except BaseException:
            # Half a file would only take space.
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise

    def folders(self) -> list["Location"]:
        """The folders directly below, by name; none if there is nothing here."""
        if isinstance(self.filesystem, fs.GcsFileSystem):
            # There, in Arrow's eyes, names with a slash make no folder.
            names = {name.split("/")[0] for name in self.files_below() if "/" in name}
            return [self / name for name in sorted(names)]
        found = self._listed()
        folders = [info.base_name for info in found if info.type == fs.FileType.Directory]
        return [self / name for name in sorted(folders)]

    def sizes(self) -> dict[str, int]:
        """Name and bytes of each file directly below, in one listing."""
        found = self._listed()
        return {info.base_name: info.size for info in found if info.type == fs.FileType.File}

    def delete(self) -> None:
        """Removes the file, if there is one."""

        def delete() -> None:
            if self.filesystem.get_file_info(self.path).type == fs.FileType.File:
                self.filesystem.delete_file(self.path)

        try:
            self._ask(delete)
        except NotFound:
            # Another process removed it in the meantime, or an attempt that got no answer did.
            return

    def is_empty(self) -> bool:
        """Whether neither a file nor a folder lies directly below, or there is nothing at all."""
        return not (self.sizes() or self.folders())

    def is_link(self) -> bool:
        """Whether this is a link to another place."""
        return self.local_path is not None and self.local_path.is_symlink()

    def odd_names(self) -> list[str]:
        """What lies directly below and is neither a file nor a folder: links, pipes, sockets."""
        if self.local_path is None or not self.local_path.is_dir():
            return []

        def odd() -> list[str]:
            with os.scandir(str(self.local_path)) as entries:
                return sorted(
                    entry.name
                    for entry in entries
                    if not (
                        entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)
                    )
                )

        return self._ask(odd)

    def delete_files(self, is_own: Callable[[str], object]) -> None:
        """Removes the files whose names `is_own` knows, and the folder if nothing else is in it."""
        if self.is_link():
            return
        for name in filter(is_own, self.sizes()):
            (self / name).delete()
        if self.is_empty() and not self.odd_names():
            self.delete_folder()

    def delete_folder(self) -> None:
        """Removes a folder and the files in it."""
        # One by one: servers other than AWS refuse the bulk deletion of the AWS SDK.
        for name in self.sizes():
            (self / name).delete()

        def delete() -> None:
            if self.filesystem.get_file_info(self.path).type == fs.FileType.Directory:
                self.filesystem.delete_dir(self.path)

        self._ask(delete)

    def _listed(self, recursive: bool = False) -> list[fs.FileInfo]:
        selector = fs.FileSelector(self.path, allow_not_found=True, recursive=recursive)

        def listed() -> list[fs.FileInfo]:
            try:
                return self.filesystem.get_file_info(selector)
            except FileNotFoundError:
                # It came into being while Arrow looked: now it is there.
                return self.filesystem.get_file_info(selector)

        return self._ask(lambda: self._surely(listed, lambda found: not found))

    def _look(self, is_empty: Callable[[fs.FileInfo], bool]) -> fs.FileInfo:
        def look() -> fs.FileInfo:
            return self.filesystem.get_file_info(self.path)

        return self._ask(lambda: self._surely(look, is_empty))

    def _pieces(self, file: NativeFile, size: int) -> bytes:
        """All of an open file, without holding it twice.

        What is larger than a piece is written once, or pieces could be of two versions.
        """
        content, buffer = io.BytesIO(), memoryview(bytearray(min(size, PIECE_BYTES)))
        for begin in range(0, size, PIECE_BYTES):
            piece = buffer[: min(PIECE_BYTES, size - begin)]
            self._read_into(file, begin, piece)
            content.write(piece)
        return content.getvalue()

    def _read_into(self, file: NativeFile, begin: int, buffer: Any) -> None:
        """Fills a buffer from an open file, which must not end before.

        Where an answer is cut off in its head, Arrow 26 says that all was read, and has written
        nothing: what the buffer held would be taken for the content. So its end is marked.
        """
        view = memoryview(buffer).cast("B")
        mark = os.urandom(min(MARK_BYTES, len(view)))
        # The content may be the mark, but not another one as well.
        for sign in (mark, bytes(255 - byte for byte in mark)):
            view[len(view) - len(sign) :] = sign
            file.seek(begin)
            count = file.readinto(view)
            if count < len(view):
                raise StorageDown(f"{self.uri}: {count} of {len(view)} bytes were sent")
            if view[len(view) - len(sign) :] != sign:
                return
        if mark:
            raise StorageDown(f"{self.uri}: an answer came without its content")

    def _open_once(self) -> NativeFile:
        """Opens the file, but nothing else that may lie there: to open a pipe waits for ever.

        Raises:
            Damaged: it is no file.
        """
        local = self.local_path
        if local is not None and local.exists() and not local.is_file():
            raise Damaged(f"{self.uri} is no file: remove what lies there, or name another")
        return self.filesystem.open_input_file(self.path)

    def _open(self) -> NativeFile:
        return self._surely(self._open_once, lambda file: not file.size())

    def _surely(self, ask: Callable[[], T], is_empty: Callable[[T], bool]) -> T:
        """Asks an object store once more where it says that there is nothing.

        Of an answer that is cut off in its head Arrow makes an empty one.
        """
        answer = ask()
        return ask() if self.local_path is None and is_empty(answer) else answer

    def _ask(self, operation: Callable[[], T]) -> T:
        def once() -> T:
            with self._explained():
                return operation()

        return retry(once, self.retry_seconds)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise explain(error, self.uri, self.local_path is not None) from error


class _Retried(io.RawIOBase):
    """An open file whose every read is retried, for `io.BufferedReader`."""

    def __init__(self, place: Location, file: NativeFile):
        self._place, self._file = place, file
        self._size, self._at = file.size(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._size - self._at))

        if wanted:
            piece = memoryview(buffer)[:wanted]
            self._place._ask(lambda: self._place._read_into(self._file, self._at, piece))
        self._at += wanted
        return wanted


@lru_cache(maxsize=OPEN_FILES)
def _opened(place: Location, thread: int) -> NativeFile:
    # Opening asks an object store for the size: once for a file, not for every part of it. An open
    # file has one place where it is read: each thread has its own.
    del thread
    return place._open()


def is_down(place: Location) -> bool:
    """Whether a place's storage doesn't answer now."""
    try:
        place.retried(0).size()
    except StorageDown:
        return True
    except BadInput:
        # An answer, if no good one.
        return False
    return False


def locate(
    uri: str,
    endpoint_url: str | None = None,
    region: str | None = None,
    retry_seconds: float = 0.0,
) -> Location:
    """The place that a URI names: a local path, `file://`, `s3://bucket/key`, `gs://bucket/key` or
    `abfss://container@account/key` (Azure).

    Args:
        uri: what it says.
        endpoint_url: of a server that is not the cloud's own; emulators of Google's storage ask for
            no credentials.
        region: of S3.
        retry_seconds: for how long each operation is retried while the storage is down.

    Raises:
        BadInput: it is no such URI (`cat_ray.uris` says what is), or the endpoint no address.
    """
    uri = expanded(uri)
    place = place_of(uri)
    endpoint = endpoint_of(endpoint_url) if endpoint_url is not None else None
    filesystem = _filesystem(place, endpoint, region)
    told = place.path if place.scheme == "file" else uri.rstrip("/")
    return Location(filesystem, place.path, told, retry_seconds)


def _filesystem(place: Place, endpoint: Endpoint | None, region: str | None) -> fs.FileSystem:
    if place.scheme == "file":
        return fs.LocalFileSystem()
    if place.scheme == "s3":
        return _s3(endpoint, region)
    if place.scheme == "gs":
        return _google(endpoint)
    return _azure(place.account, endpoint)


def _s3(endpoint: Endpoint | None, region: str | None) -> fs.FileSystem:
    return fs.S3FileSystem(
        endpoint_override=endpoint.authority if endpoint else None,
        scheme=endpoint.scheme if endpoint else "https",
        region=region or os.environ.get("AWS_REGION") or ("us-east-1" if endpoint else None),
        connect_timeout=CONNECT_SECONDS,
        request_timeout=REQUEST_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        # Not `allow_delayed_open`: there a failed first request is followed by one that puts a part
        # of the file in place.
    )


def _google(endpoint: Endpoint | None) -> fs.FileSystem:
    return fs.GcsFileSystem(
        anonymous=endpoint is not None,
        endpoint_override=endpoint.authority if endpoint else None,
        scheme=endpoint.scheme if endpoint else "https",
        retry_time_limit=timedelta(seconds=CONNECT_SECONDS),
    )


def _azure(account: str, endpoint: Endpoint | None) -> fs.FileSystem:
    authority = endpoint.authority if endpoint else None
    scheme = endpoint.scheme if endpoint else None
    return fs.AzureFileSystem(
        account,
        # As Azure's own command line has it; else managed identity and the like.
        account_key=os.environ.get("AZURE_STORAGE_KEY"),
        blob_storage_authority=authority,
        blob_storage_scheme=scheme,
        dfs_storage_authority=authority,
        dfs_storage_scheme=scheme,
    )
