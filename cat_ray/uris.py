"""What a URI says, parsed by hand: to `urlsplit` a `#` or a `?` in a key would be the key's end.

A URI is one of

    runs/a, /data/a, ~/a, file:///data/a       a path of this machine
    s3://bucket/key, gs://bucket/key           an object, or all below it
    abfss://container@account/key              likewise, on Azure; abfs:// means the same

A scheme may be written in capitals. A leading `~`, `$NAME` and `${NAME}` are expanded. Slashes at
the end mean nothing. Every other character, `#`, `?`, `%` and blanks among them, stands for itself.
`..` and links are the file system's to follow; a key can't have `..` in it. What looks like
credentials is refused, in words that don't repeat it.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from cat_ray.errors import BadInput

REMOTE_FORMS = {
    "s3": "s3://bucket/key",
    "gs": "gs://bucket/key",
    "abfss": "abfss://container@account/key",
}
SAME_SCHEME = {"abfs": "abfss"}
CREDENTIALS = (
    "a URI has a user name, a password, a signature or a port in it, and is not repeated here: "
    "credentials belong in the environment (such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), "
    "the address of a server in storage.endpoint_url or --endpoint-url"
)

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\}|([{(]))", re.ASCII)
_FILE = re.compile(r"//(?:localhost)?(/.*)|(/(?!/).*)", re.DOTALL)
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_ENDPOINT = re.compile(
    r"(https?)://((?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::(\d{1,5}))?)(/.*)?", re.IGNORECASE
)
_SECRET_NAMES = (
    r"(?:x-(?:amz|goog)-(?:signature|credential|security-token)|signature|sig|awsaccesskeyid"
    r"|\w*access[_-]?key\w*|\w*secret\w*|\w*token|password|\w*credentials?)"
)
_SECRET_PARAMETER = re.compile(rf"([?&;#]{_SECRET_NAMES}=)[^&;\s\"']*", re.IGNORECASE)
# Not a host's port, with an @ in what follows.
_USER = re.compile(r"(://)[^\s@/]*:(?!\d{1,5}/)[^\s@]*@")


@dataclass(frozen=True)
class Place:
    """What a URI names: two URIs name the same file or folder if their places are equal.

    Attributes:
        scheme: `file`, `s3`, `gs` or `abfss`.
        account: of Azure; else empty.
        path: of a file system the full path, else the bucket or container and the key.
    """

    scheme: str
    account: str
    path: str


@dataclass(frozen=True)
class Endpoint:
    """The address of an object store's server.

    Attributes:
        scheme: `http` or `https`.
        authority: its host, with the port where one is given.
    """

    scheme: str
    authority: str


def redacted(text: str) -> str:
    """The text without the credentials in the URIs that it quotes."""
    return _SECRET_PARAMETER.sub(r"\1***", _USER.sub(r"\1***@", text))


def check_has_no_credentials(text: str) -> None:
    """For whatever is shown, logged or stored later.

    Raises:
        BadInput: the text looks like a URI with credentials, or can't be shown at all.
    """
    parts = _SCHEME.fullmatch(text.strip())
    scheme, rest = (parts[1].lower(), parts[2]) if parts else ("", text.strip())
    if scheme or rest.startswith("//"):
        authority = re.split(r"[/\\]", rest.lstrip("/"), maxsplit=1)[0]
        azure = SAME_SCHEME.get(scheme, scheme) == "abfss"
        if ":" in authority or authority.count("@") > azure:
            raise BadInput(CREDENTIALS)
    if _SECRET_PARAMETER.search(text):
        raise BadInput(CREDENTIALS)
    if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
        raise BadInput(f"{text!a}: a name can't have NUL, or what is no character, in it")


def expanded(text: str) -> str:
    """The text with a leading `~`, `$NAME` and `${NAME}` replaced.

    Raises:
        BadInput: a variable isn't set, a user isn't known, or there are credentials in the text.
    """
    check_has_no_credentials(text)

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if found[3]:
            raise BadInput(f"{text}: write a variable of the environment as $NAME or ${{NAME}}")
        if name not in os.environ:
            raise BadInput(
                f"{text}: the variable {name} isn't set in the environment: set it, or write the "
                "path in full"
            )
        return os.environ[name]

    full = _VARIABLE.sub(value, text)
    check_has_no_credentials(full)
    if _VARIABLE.search(full):
        raise BadInput(f"{text}: what it is expanded to has a variable in it again")
    if full.startswith("~"):
        try:
            return str(Path(full).expanduser())
        except RuntimeError as error:
            told = f"{text}: there is no such user; put ./ before a folder of that name"
            raise BadInput(told) from error
    return full


def place_of(uri: str) -> Place:
    """What an expanded URI names; a path is made a full one.

    Raises:
        BadInput: it has another form than those above, or credentials in it.
    """
    check_has_no_credentials(uri)
    if not uri.strip():
        raise BadInput("an empty URI names no place: write a path or a URI")
    if uri != uri.lstrip() and _SCHEME.match(uri.lstrip()):
        raise BadInput(f"{uri!r}: leave out the blanks before the URI")
    parts = _SCHEME.fullmatch(uri)
    if parts is None:
        return _path(uri, uri)
    scheme, rest = SAME_SCHEME.get(parts[1].lower(), parts[1].lower()), parts[2]
    if scheme == "file":
        return _path(uri, _of_file(uri, rest))
    if scheme not in REMOTE_FORMS:
        forms = ", ".join(REMOTE_FORMS.values())
        hint = "; ./ before a name with a colon makes it a path" if "//" not in rest else ""
        raise BadInput(f"{uri}: use a local path, {forms}{hint}")
    return _object(uri, scheme, rest)


def _of_file(uri: str, rest: str) -> str:
    found = _FILE.fullmatch(rest)
    if found is None:
        raise BadInput(f"{uri}: write it as file:///full/path, or as a path alone")
    return found[1] or found[2]


def _path(uri: str, path: str) -> Place:
    if path.startswith("\\\\"):
        raise BadInput(f"{uri}: a path of Windows means nothing here; use a path of this machine")
    # To pathlib two slashes at the beginning are a root of their own.
    return Place("file", "", f"/{str(Path(path).absolute()).lstrip('/')}")


def _object(uri: str, scheme: str, rest: str) -> Place:
    form = REMOTE_FORMS[scheme]
    if not rest.startswith("//"):
        raise BadInput(f"{uri}: write it as {form}")
    authority, _, key = rest.removeprefix("//").partition("/")
    top, at, host = authority.partition("@")
    account = host.split(".")[0]
    names = [top, host, account] if scheme == "abfss" else [top]
    if bool(at) != (scheme == "abfss") or not all(_is_name(name) for name in names):
        raise BadInput(f"{uri}: write it as {form}, with the name of one that exists")
    key = key.rstrip("/")
    if key and any(part in ("", ".", "..") for part in key.split("/")):
        raise BadInput(f"{uri}: a part between two slashes is empty, . or ..; leave it out")
    if any(char < " " or char == "\x7f" for char in key):
        raise BadInput(f"{uri!a}: a key of an object store can't have control characters in it")
    return Place(scheme, account, f"{top}/{key}".rstrip("/"))


def _is_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None and name not in (".", "..")


def check_url(url: str) -> None:
    """For the address of a server, which may have a port.

    Raises:
        BadInput: it has credentials in it.
    """
    if "@" in url or _SECRET_PARAMETER.search(url):
        raise BadInput(
            "the URL of a server has credentials in it, and is not repeated here: they belong in "
            "the environment (such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
        )


def endpoint_of(url: str) -> Endpoint:
    """The address that an endpoint's URL names.

    Raises:
        BadInput: it is no such URL, or has more in it than an address.
    """
    check_url(url)
    told = f"storage.endpoint_url {url}"
    if not re.match(r"https?://", url, re.IGNORECASE):
        raise BadInput(f"{told}: begin it with http:// or https://")
    parts = _ENDPOINT.fullmatch(url)
    if parts is None or not 0 < int(parts[3] or 1) < 1 << 16:
        raise BadInput(f"{told}: write it as http://host:port")
    if (parts[4] or "/") != "/":
        raise BadInput(
            f"{told}: leave out the path {parts[4]}, which can't be used; serve the storage at the "
            "server's root"
        )
    return Endpoint(parts[1].lower(), parts[2])
