"""What URIs name, what they can't have in them, and that credentials in them are never repeated."""

import re
import string
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import assume, example, given
from hypothesis import strategies as st
from pydantic import BaseModel
from typer.testing import CliRunner

from cat_ray.cli import app
from cat_ray.cli.shell import DEBUG, with_beginning
from cat_ray.config import Config, dump, parse
from cat_ray.data.preparation import Preparation
from cat_ray.errors import BadInput
from cat_ray.evaluation.measurement import Measurement
from cat_ray.storage import locate
from cat_ray.submission.job import read_submission
from cat_ray.uris import Endpoint, Place, endpoint_of, expanded, place_of, redacted

JOBS = Path(__file__).parents[2] / "jobs"
SHORTEST = "run: {folder: r, total_images: 512}\ndata: {shards: s, num_classes: 10}\n"
SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCY"
WITH_CREDENTIALS = [
    f"s3://AKIAIOSFODNN7:{SECRET}@bucket/run",
    f"S3://AKIAIOSFODNN7:{SECRET}@bucket/run",
    f"s3:/AKIAIOSFODNN7:{SECRET}@bucket/run",
    f"s3:AKIAIOSFODNN7:{SECRET}@bucket/run",
    f"s3:///AKIAIOSFODNN7:{SECRET}@bucket/run",
    f" s3://AKIAIOSFODNN7:{SECRET}@bucket/run",
    f"s3://:{SECRET}@bucket",
    f"s3a://AKIAIOSFODNN7:{SECRET}@bucket/run",
    f"//user:{SECRET}@host/share",
    f"file://user:{SECRET}@host/share",
    f"https://user:{SECRET}@host/run",
    f"gs://user:{SECRET}@bucket/run",
    f"abfss://container:{SECRET}@account/run",
    f"abfss://container@account:{SECRET}@account/run",
    f"s3://bucket/run?X-Amz-Algorithm=AWS4&X-Amz-Signature={SECRET}",
    f"https://b.s3.amazonaws.com/k?x-amz-security-token={SECRET}",
    f"s3://bucket/run?access_key=a&secret_key={SECRET}",
    f"abfss://container@account/run?sv=2022&sig={SECRET}",
    f"https://account.blob.core.windows.net/c/k?se=1&sig={SECRET}&sp=r",
    f"gs://bucket/k?X-Goog-Signature={SECRET}",
    f"runs/a?token={SECRET}",
]


# What they name.


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("s3://b/k", Place("s3", "", "b/k")),
        ("S3://b/k/", Place("s3", "", "b/k")),
        ("s3://b", Place("s3", "", "b")),
        ("s3://b/", Place("s3", "", "b")),
        ("s3://B.old_name/k", Place("s3", "", "B.old_name/k")),
        ("s3://b/lr#1", Place("s3", "", "b/lr#1")),
        ("s3://b/lr#2/x", Place("s3", "", "b/lr#2/x")),
        ("s3://b/what?a=1&b=2", Place("s3", "", "b/what?a=1&b=2")),
        ("s3://b/a%20b", Place("s3", "", "b/a%20b")),
        ("s3://b/a b", Place("s3", "", "b/a b")),
        ("s3://b/me@host/12:30", Place("s3", "", "b/me@host/12:30")),
        ("s3://b/🐈/ü", Place("s3", "", "b/🐈/ü")),
        ("s3://b/t-{000000..000146}.tar", Place("s3", "", "b/t-{000000..000146}.tar")),
        ("s3://b/...", Place("s3", "", "b/...")),
        ("gs://b.example.com/k", Place("gs", "", "b.example.com/k")),
        ("abfss://c@a/k", Place("abfss", "a", "c/k")),
        ("abfs://c@a.dfs.core.windows.net/k", Place("abfss", "a", "c/k")),
        ("/a", Place("file", "", "/a")),
        ("//a//b/./c/", Place("file", "", "/a/b/c")),
        ("file:///a#1?x%20y", Place("file", "", "/a#1?x%20y")),
        ("FILE://localhost/a", Place("file", "", "/a")),
        ("file:/a", Place("file", "", "/a")),
        ("a#1", Place("file", "", "/usr/a#1")),
        ("a?b", Place("file", "", "/usr/a?b")),
        ("./a:b", Place("file", "", "/usr/a:b")),
        ("2026-01-01T10:00", Place("file", "", "/usr/2026-01-01T10:00")),
        ("a\nb\tc", Place("file", "", "/usr/a\nb\tc")),
        (" a ", Place("file", "", "/usr/ a ")),
        (".", Place("file", "", "/usr")),
    ],
)
def test_a_uri_names_one_place(uri, place, monkeypatch):
    monkeypatch.chdir("/usr")
    assert expanded(uri) == uri
    assert place_of(uri) == place
    if place.scheme != "file":
        assert (locate(uri).path, locate(uri).uri) == (place.path, uri.rstrip("/"))


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("s3://", "write it as s3://bucket/key"),
        ("s3:///k", "write it as s3://bucket/key"),
        ("s3:b/k", "write it as s3://bucket/key"),
        ("s3:/b/k", "write it as s3://bucket/key"),
        ("s3://b?x/k", "write it as s3://bucket/key"),
        ("s3://b#x", "write it as s3://bucket/key"),
        ("s3://a b/k", "write it as s3://bucket/key"),
        ("s3://../k", "write it as s3://bucket/key"),
        ("s3://localhost:9000/b", "storage.endpoint_url"),
        ("s3://b//k", "a part between two slashes is empty"),
        ("s3://b/a//k", "a part between two slashes is empty"),
        ("s3://b/a/../k", r"a part between two slashes is empty, \. or \.\."),
        ("s3://b/./k", r"a part between two slashes is empty, \. or \.\."),
        ("s3://b/a\nk", r"s3://b/a\\nk.*control characters"),
        ("s3://b/a\0k", "NUL"),
        ("gs://", "write it as gs://bucket/key"),
        ("abfss://c/k", "write it as abfss://container@account/key"),
        ("abfss://c@/k", "write it as abfss://container@account/key"),
        ("abfss://@a/k", "write it as abfss://container@account/key"),
        ("s3a://b/k", "use a local path, s3://bucket/key"),
        ("http://host/k", "use a local path, s3://bucket/key"),
        ("a:b", "use a local path, .*; ./ before a name with a colon"),
        ("C:\\runs", "use a local path"),
        ("C:/runs", "use a local path"),
        ("\\\\server\\runs", "a path of Windows"),
        ("file://host/path", "file:///full/path"),
        ("file:runs", "file:///full/path"),
        ("file://", "file:///full/path"),
        (" s3://b/k", "leave out the blanks"),
        ("a\0b", "NUL"),
        ("a\udc80b", "NUL, or what is no character"),
        ("~nobody-has-this-name/a", "no such user"),
        ("$CAT_RAY_UNSET/a", "CAT_RAY_UNSET isn't set"),
        ("s3://b/${CAT_RAY_UNSET}", "CAT_RAY_UNSET isn't set"),
        ("${HOME", r"write a variable of the environment as \$NAME"),
        ("${HOME:-x}/a", r"write a variable of the environment as \$NAME"),
        ("$(whoami)/a", r"write a variable of the environment as \$NAME"),
    ],
)
def test_what_names_no_place_is_refused_in_one_line(uri, told):
    with pytest.raises(BadInput, match=told) as caught:
        locate(uri)
    assert "\n" not in str(caught.value)


anything = st.text(
    st.characters() | st.sampled_from("s3:/@#?%$~{}.\\ \n\0" + string.ascii_letters), max_size=40
)
prefixed = st.sampled_from(
    ["", "s3://", "S3://b/", "gs://b/", "abfss://c@a/", "file:///", "file://", "~", "$HOME", "s3:"]
)


@given(prefixed, anything)
@example("s3://b", "//k")
@example("", "~\0")
def test_whatever_a_uri_is_it_names_a_place_or_is_bad_input(prefix, text):
    try:
        found = locate(prefix + text)
    except BadInput as error:
        assert str(error)
        return
    assert found.path and not found.path.endswith("//")
    # What a checkpoint or a worker is told leads to the same place.
    assert locate(found.uri).path == found.path


remote = st.builds("s3://{}/{}".format, st.sampled_from(["b", "B", "b.c"]), anything)


@given(remote, remote)
@example("s3://b/a#1", "s3://b/a#2")
@example("s3://b/a?1", "s3://b/a")
@example("s3://b/a%2Fb", "s3://b/a/b")
@example("s3://b/a ", "s3://b/a")
def test_two_uris_of_one_place_differ_in_the_scheme_and_the_last_slashes_alone(one, other):
    try:
        places = [place_of(expanded(uri)) for uri in (one, other)]
    except BadInput:
        assume(False)
    alike = expanded(one).rstrip("/") == expanded(other).rstrip("/")
    assert (places[0] == places[1]) == alike


# Variables and homes.


def test_the_home_and_variables_are_expanded_wherever_a_uri_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CAT_RAY_TEAM", "a team")
    for uri in ("~/r", "$HOME/r", "${HOME}/r", f"{tmp_path}/r"):
        assert locate(uri).path == f"{tmp_path}/r"
    assert locate("~").path == str(tmp_path)
    assert locate("s3://b/$CAT_RAY_TEAM/x").path == "b/a team/x"
    assert locate("a$").name == "a$"
    monkeypatch.setenv("CAT_RAY_TEAM", "$HOME")
    with pytest.raises(BadInput, match="a variable in it again"):
        locate("$CAT_RAY_TEAM/r")
    monkeypatch.setenv("CAT_RAY_TEAM", f"key:{SECRET}@bucket")
    with pytest.raises(BadInput) as caught:
        locate("s3://$CAT_RAY_TEAM/r")
    assert SECRET not in str(caught.value)


LOCAL = {
    "run.folder",
    "data.shards",
    "run.initialise_from",
    "data.cache_folder",
    "checkpoints.local_folder",
    "latents.vae",
    "objective.alignment.teacher",
}


@pytest.mark.parametrize("key", sorted(LOCAL))
def test_no_key_makes_a_folder_that_is_called_home(key, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("~/x", "$HOME/x", "${HOME}/x"):
        config = parse(SHORTEST, "job.yaml", [f"{key}={value}"])
        assert f"{tmp_path}/x" in yaml.safe_load(dump(config))[key.split(".")[0]].values() or (
            config.objective.alignment.teacher == f"{tmp_path}/x"
        )
    with pytest.raises(BadInput, match=f"{key}: .*UNSET isn't set"):
        parse(SHORTEST, "job.yaml", [f"{key}=$CAT_RAY_UNSET/x"])


def test_what_is_sent_to_a_cluster_is_expanded_there(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(SHORTEST)
    folder = "folder: $CAT_RAY_UNSET/r"
    path.write_text(SHORTEST.replace("folder: r", folder).replace("shards: s", "shards: ~/s"))
    sent = read_submission(str(path), [], None)
    assert folder in sent.text and "shards: ~/s" in sent.text
    assert sent.places_of(tmp_path) == {"run.folder": "$CAT_RAY_UNSET/r", "data.shards": "~/s"}


@pytest.mark.parametrize("key", ["data.cache_folder", "checkpoints.local_folder"])
def test_what_must_lie_on_this_machine_is_no_uri_of_another(key):
    with pytest.raises(BadInput, match=f"{key}: .*not an object store"):
        parse(SHORTEST, "job.yaml", [f"{key}=s3://b/k"])
    assert "\n    /a\n" not in dump(parse(SHORTEST, "job.yaml", [f"{key}=file:///a"]))
    assert ": /a\n" in dump(parse(SHORTEST, "job.yaml", [f"{key}=file:///a"]))


ODD_NAMES = [
    "🐈",
    "ü b",
    'quo"te',
    "a\nb",
    "a\tb",
    "a\x85b",
    "a\u2028b",
    "x: y",
    "# x",
    "\x7f",
    "'",
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_beginning_of_any_name_is_the_one_that_was_typed(name):
    (override,) = with_beginning(None, f"./{name}")
    assert parse(SHORTEST, "job.yaml", [override]).run.initialise_from == f"./{name}"


@pytest.mark.parametrize("name", [*ODD_NAMES, "lr#1", "lr#2", "a?b", "%41", "A", "a+b", " a "])
def test_a_local_folder_of_any_name_holds_what_is_written_there(name, tmp_path):
    (locate(f"{tmp_path}/{name}") / "file").write(name.encode())
    assert (tmp_path / name / "file").read_bytes() == name.encode()


def test_keys_with_odd_characters_are_folders_of_their_own_on_s3(s3_server):
    top = locate(f"s3://{s3_server.bucket}/odd", s3_server.endpoint_url)
    names = ["lr#1", "lr#2", "lr", "a?b", "a", "%41", "A", "a b", "a+b", "🐈", "x:y@z"]
    for name in names:
        folder = locate(f"{top.uri}/{name}/", s3_server.endpoint_url)
        (folder / "file").write(name.encode())
    keys = s3_server.client.list_objects_v2(Bucket=s3_server.bucket, Prefix="odd/")["Contents"]
    found = {key["Key"] for key in keys if not key["Key"].endswith("/")}
    assert found == {f"odd/{name}/file" for name in names}
    for folder in top.folders():
        assert (folder / "file").read() == folder.name.encode()
        assert locate(folder.uri, s3_server.endpoint_url).path == folder.path
    assert {folder.name for folder in top.folders()} == set(names)


# Endpoints.


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("http://host", Endpoint("http", "host")),
        ("http://host/", Endpoint("http", "host")),
        ("HTTPS://Host.example:9000/", Endpoint("https", "Host.example:9000")),
        ("http://minio_1:9000", Endpoint("http", "minio_1:9000")),
        ("http://[::1]:9000", Endpoint("http", "[::1]:9000")),
        ("http://127.0.0.1:1", Endpoint("http", "127.0.0.1:1")),
    ],
)
def test_an_endpoint_is_a_scheme_and_an_address(url, endpoint):
    assert endpoint_of(url) == endpoint


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://host/minio", "leave out the path /minio"),
        ("http://host/minio/", "leave out the path /minio/"),
        ("http://host//", "leave out the path //"),
        ("host:9000", "begin it with http://"),
        ("", "begin it with http://"),
        ("s3://host", "begin it with http://"),
        ("http://", "write it as http://host:port"),
        ("http:///b", "write it as http://host:port"),
        ("http://host:99999", "write it as http://host:port"),
        ("http://host:0", "write it as http://host:port"),
        ("http://host:", "write it as http://host:port"),
        ("http://host?x=1", "write it as http://host:port"),
        ("http://host#x", "write it as http://host:port"),
        ("http://ho st", "write it as http://host:port"),
        ("http://[::1", "write it as http://host:port"),
        ("http://höst", "write it as http://host:port"),
        (" http://host", "begin it with http://"),
    ],
)
def test_an_endpoint_with_more_or_less_than_an_address_is_refused(url, told):
    with pytest.raises(BadInput, match=told):
        locate("s3://b/k", url)
    with pytest.raises(BadInput, match=rf"storage\.endpoint_url.*{told}"):
        parse(SHORTEST, "job.yaml", [f"storage.endpoint_url={yaml.safe_dump(url)}"])


@given(st.text(st.characters() | st.sampled_from("ht:/[]@.?#0123456789"), max_size=30))
def test_whatever_an_endpoint_is_it_is_used_or_is_bad_input(text):
    for url in (text, f"http://{text}"):
        try:
            endpoint_of(url)
        except BadInput as error:
            assert str(error)


# Credentials.


def texts(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted keys of all values that are text."""
    for name, field in kind.model_fields.items():
        options = [field.annotation, *get_args(field.annotation)]
        sections = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if sections:
            yield from texts(sections[0], f"{prefix}{name}.")
        elif str in options or any(str in get_args(option) for option in options):
            yield prefix + name


# Of the last one, a phase's own job is read in turn.
NO_PLACES = {
    "storage.region",
    "latents.revision",
    "source.image_column",
    "source.label_column",
    "schedule.set",
}
SHORT_JOBS = {
    Config: SHORTEST,
    Measurement: "samples: {checkpoint: c}\nfeatures: {network: pixels}\nreference: r\n"
    "output: {folder: o}\n",
    Preparation: "source: {kind: mnist}\noutput: {folder: o}\n",
}


@pytest.mark.parametrize("kind", [Config, Measurement, Preparation])
@pytest.mark.parametrize("uri", WITH_CREDENTIALS)
def test_no_key_of_a_job_takes_credentials_or_repeats_them(kind, uri):
    keys = [key for key in texts(kind) if key not in NO_PLACES and not key.endswith("sha256")]
    assert len(keys) >= 5
    for key in keys:
        values: dict[str, Any] = yaml.safe_load(SHORT_JOBS[kind])
        *sections, last = key.split(".")
        below = values
        for section in sections:
            below = below.setdefault(section, {})
        below[last] = uri
        for as_written in (False, True):
            with pytest.raises(BadInput) as caught:
                parse(yaml.safe_dump(values, width=1000), "job.yaml", (), kind, as_written)
            told = "".join(traceback.format_exception(caught.value))
            assert f"{key}: " in str(caught.value)
            assert SECRET not in told and "wJalr" not in told, told


@pytest.mark.parametrize("uri", WITH_CREDENTIALS)
def test_no_place_and_no_message_of_one_repeats_credentials(uri):
    with pytest.raises(BadInput) as caught:
        locate(uri)
    assert "wJalr" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", WITH_CREDENTIALS[0]],
        ["report", WITH_CREDENTIALS[-2]],
        ["train", WITH_CREDENTIALS[0]],
        ["train", str(JOBS / "quickstart.yaml"), "--set", f"run.folder={WITH_CREDENTIALS[0]}"],
        ["train", str(JOBS / "quickstart.yaml"), "--set", f"run.folder=[{WITH_CREDENTIALS[0]}"],
        ["train", str(JOBS / "quickstart.yaml"), "--set", f"run.folder.x={WITH_CREDENTIALS[0]}"],
        ["train", str(JOBS / "quickstart.yaml"), "--set", WITH_CREDENTIALS[0]],
        ["train", str(JOBS / "quickstart.yaml"), "--initialise-from", WITH_CREDENTIALS[0]],
        ["index", WITH_CREDENTIALS[0], "--endpoint-url", "http://host"],
        ["inspect", "s3://b/k", "--endpoint-url", f"http://user:{SECRET}@host"],
        ["inspect", "s3://b/k", "--endpoint-url", f"http://user:{SECRET}@host/minio"],
        ["inspect", "s3://b/k", "--endpoint-url", f"minio://user:{SECRET}@host"],
    ],
)
def test_no_command_shows_credentials_not_even_with_a_traceback(arguments, debug):
    try:
        result = CliRunner().invoke(app, ["--debug"] * debug + arguments)
    finally:
        DEBUG.clear()
    assert result.exit_code == 2
    assert "wJalr" not in result.output, result.output
    assert re.search(r"^cat-ray: .+$", result.output, re.MULTILINE)


def test_broken_yaml_is_told_without_the_line_that_it_is_in():
    with pytest.raises(BadInput, match="line 1, column") as caught:
        parse(f"run: {{folder: 's3://a:{SECRET}@b/c', total_images: 512]", "job.yaml")
    assert "wJalr" not in str(caught.value)


def test_what_is_no_credential_stays_in_a_message():
    for text in ("http://127.0.0.1:9000/b/me@host", "s3://b/k: status 403", "abfss://c@a/k"):
        assert redacted(text) == text
