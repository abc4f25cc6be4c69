"""Class folders: no class changes its number without a word, and what isn't read is counted."""

import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import fs

from cat_ray.data.sources import Source, guess_kind, list_units, read_unit
from cat_ray.errors import BadInput, ExpectedError
from cat_ray.storage import Location, locate

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"


def make(root: Path, *names: str) -> Path:
    """Files of a byte by their paths; a folder where a path ends with a slash."""
    root.mkdir(exist_ok=True)
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(b"x")
    return root


def remote(path: Path) -> Location:
    """The same on a filesystem that isn't this machine's, as an object store is."""
    store = fs.SubTreeFileSystem(str(path.parent), fs.LocalFileSystem())
    return Location(store, path.name, f"s3://bucket/{path.name}")


def found(place: Location, pattern: str = "") -> tuple[dict[str, int], tuple[str, ...], Counter]:
    """Class of each image by its path, the classes, and what was left out."""
    assert guess_kind(place, pattern) == "folders"
    left_out = Counter[str]()
    units, classes = list_units(Source("folders", place, pattern=pattern), left_out)
    return {unit.file: unit.label for unit in units}, classes, left_out


@pytest.mark.parametrize("where", [lambda path: locate(str(path)), remote])
def test_class_folders_without_images_are_named_and_so_are_the_endings_there(tmp_path, where):
    root = make(tmp_path / "gap", "n01/a.JPEG", "n02/", "n03/a.jfif", "n03/b.jfif", "n04/a.JPEG")
    make(root, "n04/a.bmp", "n04/b.tif")
    with pytest.raises(BadInput) as caught:
        found(where(root))
    assert "no images are in n02, n03. Left out: .jfif (2), .bmp (1), .tif (1)" in str(caught.value)


@pytest.mark.parametrize("where", [lambda path: locate(str(path)), remote])
def test_what_systems_and_tools_leave_is_no_class_and_no_image(tmp_path, where):
    root = make(tmp_path / "mac", "n01/0.JPEG", "n02/0.JPEG", "n02/._0.JPEG", "n02/a.txt")
    make(root, "__MACOSX/n01/._0.JPEG", ".ipynb_checkpoints/0-checkpoint.JPEG", "LICENSE")
    make(root, "n01/.ipynb_checkpoints/1-checkpoint.JPEG", "lost+found/", "@eaDir/n01/0.jpg")
    images, classes, left_out = found(where(root))
    assert (images, classes) == ({"n01/0.JPEG": 0, "n02/0.JPEG": 1}, ("n01", "n02"))
    assert left_out["._*"] == 1 and left_out[".ipynb_checkpoints"] == 2
    assert left_out["__MACOSX"] == left_out[".txt"] == left_out["without an ending"] == 1


@pytest.mark.parametrize("splits", [("train", "val"), ("Train", "test", "valid"), ("train",)])
def test_splits_are_no_classes(tmp_path, splits):
    root = make(tmp_path / "root", *(f"{split}/n01/a.JPEG" for split in splits))
    with pytest.raises(BadInput) as caught:
        found(locate(str(root)))
    assert f"holds the splits {', '.join(sorted(splits))} and no classes" in str(caught.value)
    assert f"such as {root}/{splits[0]}" in str(caught.value)


def test_a_train_may_be_a_class_among_others(tmp_path):
    root = make(tmp_path / "coco", "bus/a.jpg", "car/a.jpg", "train/a.jpg")
    assert found(locate(str(root)))[1] == ("bus", "car", "train")


def test_splits_in_class_folders_are_told_and_a_pattern_selects_one(tmp_path):
    root = make(tmp_path / "mvtec", "nut/train/good/1.png", "nut/test/bad/1.png")
    make(root, "pin/train/good/2.png", "pin/test/bad/2.png")
    with pytest.raises(BadInput, match=r"the splits test, train\. .* such as \*/train/\*/\*"):
        found(locate(str(root)))
    images, _, left_out = found(locate(str(root)), "*/train/*/*")
    assert images == {"nut/train/good/1.png": 0, "pin/train/good/2.png": 1}
    assert left_out == {"not selected by source.pattern": 2}
    with pytest.raises(BadInput, match=r"source.pattern \*\.gif selects none of 4 files"):
        list_units(Source("folders", locate(str(root)), pattern="*.gif"))


def test_images_without_class_folders_are_one_class(tmp_path):
    root = make(tmp_path / "flat", "a.JPEG", "b.JPEG", "labels.csv", ".hidden/a.jpg")
    images, classes, left_out = found(locate(str(root)))
    assert (images, classes) == ({"a.JPEG": 0, "b.JPEG": 0}, ("flat",))
    assert left_out == {".csv": 1, ".hidden": 1}


def test_images_beside_class_folders_are_counted_or_refused(tmp_path):
    root = make(tmp_path / "mixed", "a.JPEG", "n01/a.JPEG")
    assert found(locate(str(root)))[2] == {"images outside of class folders": 1}
    with pytest.raises(BadInput, match=r"holds images, and folders without any \(xml\)"):
        found(locate(str(make(tmp_path / "voc", "a.JPEG", "xml/a.xml"))))


def test_numbered_folders_are_in_the_order_of_their_names(tmp_path):
    root = make(tmp_path / "numbers", *(f"{n}/a.JPEG" for n in range(12)))
    assert found(locate(str(root)))[1] == tuple(sorted(map(str, range(12))))


def test_images_that_git_has_not_fetched_are_told(tmp_path):
    root = make(tmp_path / "lfs", "n01/a.JPEG")
    (root / "n01/b.JPEG").write_bytes(POINTER)
    (root / "n01/a.JPEG").write_bytes(bytes(500))
    with pytest.raises(BadInput, match=r"n01/b\.JPEG is a Git LFS pointer.*`git lfs pull`"):
        found(locate(str(root)))


ODD = ("a b+c%20d#e?.JPEG", "新しい.JPEG", "'q\"\n.JPEG", "x" * 200 + ".JPEG")


def test_names_may_be_odd(tmp_path):
    root = make(tmp_path / "odd", *(f"n01/{name}" for name in ODD))
    source = Source("folders", locate(str(root)))
    units, _ = list_units(source)
    assert {unit.file for unit in units} == {f"n01/{name}" for name in ODD}
    assert all(read_unit(source, unit)[0].content == b"x" for unit in units)


@pytest.mark.parametrize("above", ["n01/", ""])
def test_a_folder_with_a_name_that_is_not_utf8_is_named(tmp_path, above):
    root = make(tmp_path / "latin", "n01/a.JPEG")
    Path(os.fsdecode(os.fsencode(f"{root}/{above}caf") + b"\xe9.JPEG")).write_bytes(b"x")
    folder = f"{root}/{above}".rstrip("/")
    with pytest.raises(BadInput, match=rf"{folder} holds a name that is not UTF-8, caf\\xe9\.JPEG"):
        found(locate(str(root)))


# Links.


def test_a_class_folder_may_be_a_link(tmp_path):
    make(tmp_path / "real", "a.JPEG")
    root = make(tmp_path / "links", "n02/a.JPEG")
    (root / "n01").symlink_to(tmp_path / "real")
    (root / "n02/b.JPEG").symlink_to("a.JPEG")
    (root / "n02/c.JPEG").symlink_to("gone.JPEG")
    images, classes, left_out = found(locate(str(root)))
    assert images == {"n01/a.JPEG": 0, "n02/a.JPEG": 1, "n02/b.JPEG": 1}
    assert classes == ("n01", "n02")
    assert left_out == {"links that lead nowhere": 1}


def test_a_class_whose_link_leads_nowhere_is_named(tmp_path):
    root = make(tmp_path / "links", "n01/a.JPEG")
    (root / "n02").symlink_to("../gone/n02")
    with pytest.raises(BadInput, match=r"n02 is a link to \.\./gone/n02, which leads nowhere"):
        found(locate(str(root)))


@pytest.mark.parametrize(
    ("link", "to", "told"),
    [
        ("n03", "../links", "is a link back to a folder in which it lies"),
        ("n03", "/", "is a link back to a folder in which it lies"),
        ("n01/up", "..", "is a link back to a folder in which it lies"),
        ("n01/self", ".", "is a link back to a folder in which it lies"),
        ("n01/b", "../n02", "are the same folder, by a link"),
    ],
)
def test_a_link_to_a_folder_that_is_read_already_is_named(tmp_path, link, to, told):
    root = make(tmp_path / "links", "n01/a.JPEG", "n02/a.JPEG")
    (root / link).symlink_to(to)
    with pytest.raises(BadInput, match=f"{link}.*{told}"):
        list_units(Source("folders", locate(str(root))))


def test_links_in_a_circle_are_named(tmp_path):
    root = make(tmp_path / "links", "n01/a.JPEG", "n02/a.JPEG")
    (root / "n01/b").symlink_to("../n02")
    (root / "n02/a").symlink_to("../n01")
    with pytest.raises(BadInput, match="are the same folder, by a link"):
        list_units(Source("folders", locate(str(root))))


def test_what_is_neither_file_nor_folder_is_not_read(tmp_path):
    root = make(tmp_path / "pipes", "n01/a.JPEG")
    os.mkfifo(root / "n01/b.JPEG")
    assert found(locate(str(root)))[2] == {"neither files nor folders": 1}


# Any tree.

PARTS = ("n01", "n02", "n03", "train", "val", "deep", "__MACOSX", ".git", "._n01", "lost+found")
LEAVES = ("a.JPEG", "b.png", "c.webp", "d.jfif", "e.txt", "LICENSE", "._a.JPEG", ".DS_Store", "")
trees = st.lists(
    st.tuples(st.lists(st.sampled_from(PARTS), max_size=3), st.sampled_from(LEAVES)), max_size=12
)


def check_tree(root: Path, tree: list[tuple[list[str], str]]) -> None:
    """Either one line of ours, or every image in the class of its outermost folder, or counted."""
    for parts, leaf in tree:
        folder = root.joinpath(*parts)
        folder.mkdir(parents=True, exist_ok=True)
        if leaf:
            (folder / leaf).write_bytes(b"x")
    left_out = Counter[str]()
    try:
        units, classes = list_units(Source("folders", locate(str(root))), left_out)
    except ExpectedError as error:
        assert "\n" not in str(error) and str(root) in str(error)
        return
    on_disk = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name[0] not in "._")
    assert list(classes) == [f for f in folders if f != "lost+found"] or classes == (root.name,)
    for unit in units:
        top = unit.file.split("/")[0]
        assert unit.label == (classes.index(top) if "/" in unit.file else 0)
    assert not {"train", "val"} <= set(classes)
    assert {unit.label for unit in units} == set(range(len(classes)))
    if len(units) < len(on_disk):
        assert left_out.total() > 0


@settings(max_examples=150, deadline=None)
@given(trees)
@example([([], "a.JPEG"), (["n01"], "")])
def test_in_any_tree_a_class_keeps_its_number_or_one_line_says_why(tmp_path_factory, tree):
    check_tree(tmp_path_factory.mktemp("tree"), tree)


@pytest.mark.long
@settings(max_examples=10_000, deadline=None)
@given(trees)
def test_in_any_of_ten_thousand_trees_a_class_keeps_its_number(tmp_path_factory, tree):
    check_tree(tmp_path_factory.mktemp("tree"), tree)
