"""Which shards the arguments of `cat-ray index` name."""

import pytest

from cat_ray.data.shard_uris import folder_and_names
from cat_ray.errors import BadInput

THREE = [f"train-{n:06d}.tar" for n in range(3)]


@pytest.mark.parametrize(
    ("uris", "folder", "names"),
    [
        (["s3://b/a"], "s3://b/a", []),
        (["/data/shards/"], "/data/shards/", []),
        (["."], ".", []),
        (["s3://b/train-{000000..000002}.tar"], "s3://b", THREE),
        # As a shell expands it.
        ([f"s3://b/{name}" for name in THREE], "s3://b", THREE),
        (["s3://b/train-00000{0..1}.tar", "s3://b/train-000002.tar"], "s3://b", THREE),
        (["s3://b/{train-000000.tar,train-000001.tar,train-000002.tar}"], "s3://b", THREE),
        (THREE[::-1], ".", THREE[::-1]),
        (["/0.tar"], "/", ["0.tar"]),
        (["a/{x}/0.tar"], "a/{x}", ["0.tar"]),
        (["file:///data/0.tar"], "file:///data", ["0.tar"]),
    ],
)
def test_uris_name_a_folder_and_the_shards_in_it(uris, folder, names):
    assert folder_and_names(uris) == (folder, names)


@pytest.mark.parametrize(
    ("uris", "told"),
    [
        (["s3://a/0.tar", "s3://b/0.tar"], r"s3://a/ and s3://b/ are two folders"),
        (["s3://{a,b}/0.tar"], r"s3://a/ and s3://b/ are two folders"),
        (["0.tar", "a/1.tar"], r"\. and a/ are two folders"),
        (["s3://a", "s3://b"], r"s3://a is no \.tar file: give one folder"),
        (["s3://a", "s3://a/0.tar"], r"s3://a is no \.tar file"),
        (["a/0.tar", "a/1.tar", "a/0.tar"], r"0\.tar is named twice"),
        (["a/{0..3.tar"], r"a/\{0\.\.3\.tar: its braces don't match"),
        (["a/{0..99999999999}.tar"], r"names more than 1,000,000 shards: give their folder"),
        (["a/{0..9999}{0..9999}.tar"], r"names more than 1,000,000 shards: give their folder"),
        ([f"a/{{0..{'9' * 5000}}}.tar"], r"names more than 1,000,000 shards: give their folder"),
    ],
)
def test_uris_that_name_no_shards_of_one_folder_are_refused_in_one_line(uris, told):
    with pytest.raises(BadInput, match=told) as caught:
        folder_and_names(uris)
    assert "\n" not in str(caught.value)
