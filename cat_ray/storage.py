"""Local paths and object stores behind one small type: the only place that knows endpoints."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from pyarrow import fs

from cat_ray.errors import BadInput

CONNECT_SECONDS = 5.0
REQUEST_SECONDS = 60.0
ATTEMPTS = 4
REMOTE_HINT = "; check the URI, storage.endpoint_url and the AWS credentials in the environment"

# Servers other than AWS refuse the checksum trailers that the AWS SDK would send. Uploads and
# downloads are verified by our own hashes.
ENVIRONMENT = {"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)


@dataclass(frozen=True)
class Location:
    """A file or folder on a filesystem. `location / "name"` is one below it."""

    filesystem: fs.FileSystem
    path: str
    uri: str

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
            hint = "" if self.local_path else REMOTE_HINT
            raise BadInput(f"storage failed at {self.uri}: {reason}{hint}") from error


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
