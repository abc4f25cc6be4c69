"""Local paths and object stores behind one small type: the only place that knows endpoints."""

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from pyarrow import NativeFile, fs

from cat_ray.errors import BadInput

CONNECT_SECONDS = 5.0
REQUEST_SECONDS = 60.0
ATTEMPTS = 4
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 10.0
OPEN_FILES = 256
# What a server says, in Arrow's words, that no waiting mends.
FINAL = (
    "NO_SUCH_",
    "ACCESS_DENIED",
    "ACCESS_KEY",
    "SIGNATURE",
    "TOKEN",
    "CREDENTIALS",
    "status 40",
)
REMOTE_HINT = "; check the URI, storage.endpoint_url and the AWS credentials in the environment"

# Servers other than AWS refuse the checksum trailers that the AWS SDK would send. Uploads and
# downloads are verified by our own hashes.
ENVIRONMENT = {"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)


class StorageDown(BadInput):
    """The storage doesn't answer, or not as it should: it may do so again."""


@dataclass(frozen=True)
class Location:
    """A file or folder on a filesystem. `location / "name"` is one below it."""

    filesystem: fs.FileSystem
    path: str
    uri: str

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
    def local_path(self) -> Path | None:
        """The path on this machine, or None for an object store."""
        return Path(self.path) if isinstance(self.filesystem, fs.LocalFileSystem) else None

    def size(self) -> int | None:
        """Bytes of the file, or None if there is none."""
        with self._explained():
            info = self.filesystem.get_file_info(self.path)
        return info.size if info.type == fs.FileType.File else None

    def exists(self) -> bool:
        """Whether there is a file here."""
        return self.size() is not None

    def read(self) -> bytes:
        """The file's bytes.

        Raises:
            BadInput: there is no such file, or the storage doesn't answer.
        """
        with self._explained(), self.filesystem.open_input_file(self.path) as file:
            return file.read()

    def read_range(self, begin: int, end: int) -> bytes:
        """Some of the file's bytes. The file is held open, so that it must not change.

        Raises:
            BadInput: there is no such file, it ends before, or the storage doesn't answer.
        """
        with self._explained():
            content = _opened(self).read_at(end - begin, begin)
        if len(content) < end - begin:
            raise BadInput(f"{self.uri} ends at byte {begin + len(content)}, before {end}")
        return content

    @contextmanager
    def opened(self) -> Iterator[NativeFile]:
        """The file, for those who want to seek in it."""
        with self._explained(), self.filesystem.open_input_file(self.path) as file:
            yield file

    def files_below(self) -> dict[str, int]:
        """Path from here and bytes of each file below, at any depth."""
        selector = fs.FileSelector(self.path, allow_not_found=True, recursive=True)
        with self._explained():
            found = self.filesystem.get_file_info(selector)
        start = len(self.path.rstrip("/")) + 1
        return {info.path[start:]: info.size for info in found if info.type == fs.FileType.File}

    def write(self, content: bytes) -> None:
        """Puts a whole file in place at once: a reader finds the old one or the new one."""
        with self._explained():
            local = self.local_path
            if local is None:
                with self.filesystem.open_output_stream(self.path) as file:
                    file.write(content)
                return
            local.parent.mkdir(parents=True, exist_ok=True)
            partial = local.with_name(f".{local.name}.partial")
            partial.write_bytes(content)
            partial.replace(local)

    def upload(self, source: Path) -> None:
        """Copies a local file here, in pieces; in place at once, as `write`."""
        with self._explained():
            local = self.local_path
            target = self.path
            if local is not None:
                local.parent.mkdir(parents=True, exist_ok=True)
                target = str(local.with_name(f".{local.name}.partial"))
            fs.copy_files(
                str(source),
                target,
                source_filesystem=fs.LocalFileSystem(),
                destination_filesystem=self.filesystem,
            )
            if local is not None:
                Path(target).replace(local)

    def folders(self) -> list["Location"]:
        """The folders directly below, by name; none if there is nothing here."""
        selector = fs.FileSelector(self.path, allow_not_found=True)
        with self._explained():
            found = self.filesystem.get_file_info(selector)
        names = [info.base_name for info in found if info.type == fs.FileType.Directory]
        return [self / name for name in sorted(names)]

    def sizes(self) -> dict[str, int]:
        """Name and bytes of each file directly below, in one listing."""
        selector = fs.FileSelector(self.path, allow_not_found=True)
        with self._explained():
            found = self.filesystem.get_file_info(selector)
        return {info.base_name: info.size for info in found if info.type == fs.FileType.File}

    def delete(self) -> None:
        """Removes the file, if there is one."""
        if self.exists():
            with self._explained():
                self.filesystem.delete_file(self.path)

    def delete_folder(self) -> None:
        """Removes a folder and the files in it."""
        # One by one: servers other than AWS refuse the bulk deletion of the AWS SDK.
        for name in self.sizes():
            (self / name).delete()
        with self._explained():
            self.filesystem.delete_dir(self.path)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise BadInput(f"{self.uri} doesn't exist") from error
        except OSError as error:
            reason = str(error).splitlines()[0]
            if "NO_SUCH_KEY" in reason:
                raise BadInput(f"{self.uri} doesn't exist") from error
            final = self.local_path is not None or any(mark in reason for mark in FINAL)
            hint = "" if self.local_path else REMOTE_HINT
            raise (BadInput if final else StorageDown)(
                f"storage failed at {self.uri}: {reason}{hint}"
            ) from error


@lru_cache(maxsize=OPEN_FILES)
def _opened(place: Location) -> NativeFile:
    # Opening asks an object store for the size: once for a file, not for every part of it.
    return place.filesystem.open_input_file(place.path)


Answer = TypeVar("Answer")


def patiently(ask: Callable[[], Answer], seconds: float) -> Answer:
    """Asks a storage again and again, with growing pauses, while it is down.

    Raises:
        StorageDown: it still is after so many seconds.
        BadInput: it answered, with something that asking again won't change.
    """
    until, pause = time.monotonic() + seconds, FIRST_PAUSE_SECONDS
    while True:
        try:
            return ask()
        except StorageDown:
            if time.monotonic() + pause > until:
                raise
        # Many readers must not all come back at once.
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def locate(uri: str, endpoint_url: str | None = None, region: str | None = None) -> Location:
    """The place that a local path, `file://` or `s3://bucket/key` names.

    Raises:
        BadInput: the scheme is not one that is supported.
    """
    parts = urlsplit(uri)
    if parts.scheme in ("", "file"):
        path = str(Path(parts.path if parts.scheme else uri).expanduser().absolute())
        return Location(fs.LocalFileSystem(), path, path)
    if parts.scheme != "s3":
        raise BadInput(f"{uri}: use a local path or s3://bucket/key")
    if endpoint_url is not None and urlsplit(endpoint_url).scheme not in ("http", "https"):
        raise BadInput(f"storage.endpoint_url {endpoint_url}: begin it with http:// or https://")
    endpoint = urlsplit(endpoint_url) if endpoint_url else None
    filesystem = fs.S3FileSystem(
        endpoint_override=endpoint.netloc if endpoint else None,
        scheme=endpoint.scheme if endpoint else "https",
        region=region or os.environ.get("AWS_REGION") or ("us-east-1" if endpoint else None),
        connect_timeout=CONNECT_SECONDS,
        request_timeout=REQUEST_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
    )
    path = f"{parts.netloc}{parts.path}".rstrip("/")
    return Location(filesystem, path, uri.rstrip("/"))
