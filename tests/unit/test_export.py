"""An exported generator: one folder, opened without the rest, that makes the same pictures."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import Distribution, distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import cat_ray
from cat_ray.checkpoint.layout import GENERATOR, State, average_group
from cat_ray.checkpoint.read import load_generator, read_tensors
from cat_ray.config import dump, parse
from cat_ray.data.index import Index, Shard, write_index
from cat_ray.errors import BadInput, RunFailed
from cat_ray.evaluation.pictures import write_pictures
from cat_ray.evaluation.sampling import Truncation, class_means, latents, sample_stages
from cat_ray.exported import CLASS_MEANS, FORMAT, MODEL, WEIGHTS, Description, parse_description
from cat_ray.model.build import build_generator
from cat_ray.model.generator import Generator, GeneratorShape
from cat_ray.model.sizes import Size
from cat_ray.operations import export as exporting
from cat_ray.operations import onnx_graph
from cat_ray.operations.export import export
from cat_ray.operations.model_card import README
from cat_ray.operations.onnx_graph import COMPARED_BATCHES, ONNX, TOLERANCE
from cat_ray.storage import Location, locate


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def exported(checkpoint: Location, out: Path) -> Path:
    """The folder of the tiny job's checkpoint, exported."""
    export(checkpoint, locate(str(out)))
    return out


# What is in the folder.


def test_the_folder_holds_weights_class_means_description_and_readme(exported):
    assert sorted(path.name for path in exported.iterdir()) == sorted(
        [WEIGHTS, CLASS_MEANS, README, MODEL]
    )


@pytest.mark.parametrize(
    ("decay", "group"),
    [(None, average_group(0.9)), (0.5, average_group(0.5)), (0.0, GENERATOR)],
)
def test_the_weights_are_those_of_the_average_asked_for(checkpoint, out, decay, group):
    export(checkpoint, locate(str(out)), decay)
    found, expected = load_file(out / WEIGHTS), read_tensors(checkpoint, group)
    assert found.keys() == expected.keys()
    for name, weights in found.items():
        assert weights.dtype == torch.float32
        assert torch.equal(weights, expected[name])


def test_model_json_is_written_last(checkpoint, out, monkeypatch):
    written = []

    def recorded(place: Location, content: bytes, write=Location.write) -> None:
        written.append(place.name)
        write(place, content)

    monkeypatch.setattr(Location, "write", recorded)
    export(checkpoint, locate(str(out)))
    assert written.index(MODEL) == len(written) - 1
    assert {WEIGHTS, CLASS_MEANS, README} < set(written)


def test_an_export_that_was_cut_short_is_none(exported):
    (exported / MODEL).unlink()
    with pytest.raises(
        BadInput, match=f"is no export, or one that was cut short: it has no {MODEL}"
    ):
        cat_ray.load_generator(exported)


def test_the_description_tells_where_the_weights_come_from(exported, checkpoint):
    found = json.loads((exported / MODEL).read_bytes())["provenance"]
    assert found["checkpoint"] == checkpoint.name
    assert (found["images_seen"], found["decay"], found["seed"]) == (32, 0.9, 0)
    assert (found["data_sha256"], found["trained_with"]) == ("digest", {"python": "3"})
    assert found["exported_with"]["cat-ray"] == cat_ray.__version__
    manifest = Path(checkpoint.path) / "manifest.json"
    summed = subprocess.run(["sha256sum", manifest], capture_output=True, text=True, check=True)
    assert found["manifest_sha256"] == summed.stdout.split()[0]


def test_the_readme_tells_provenance_and_licence_and_no_path(exported, checkpoint, tmp_path):
    text = (exported / README).read_text()
    found = json.loads((exported / MODEL).read_bytes())["provenance"]
    for told in (checkpoint.name, found["manifest_sha256"], found["config_sha256"], "digest"):
        assert told in text
    assert "average with decay 0.9" in text
    assert "Apache License 2.0" in text
    assert str(tmp_path) not in text + (exported / MODEL).read_text()
    assert re.search(r"[{}]", text) is None


def test_the_readmes_python_runs(exported):
    (code,) = re.findall(r"```python\n(.*?)```", (exported / README).read_text(), re.S)
    names: dict = {}
    exec(code.replace("PATH_TO_THIS_FOLDER", str(exported)), names)
    assert names["pixels"].shape == (3, 1, 32, 32)
    assert names["pixels"].dtype == torch.uint8


@pytest.mark.parametrize("left", ["file", "folder"])
def test_a_folder_that_holds_something_is_refused_and_left_alone(checkpoint, out, left):
    out.mkdir()
    (out / "mine").write_text("precious") if left == "file" else (out / "mine").mkdir()
    with pytest.raises(BadInput, match="isn't empty: choose another --out"):
        export(checkpoint, locate(str(out)))
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_an_average_that_does_not_exist_is_refused_before_anything_is_written(checkpoint, out):
    with pytest.raises(BadInput, match=r"has no generator.average-0.7, it has"):
        export(checkpoint, locate(str(out)), decay=0.7)
    assert not out.exists()


# Latents.

LATENT_JOB = {"channels: 1": "channels: 4", "source: mnist, ": ""}


def latent_checkpoint(
    tmp_path: Path, tiny_job: str, save_checkpoint: Callable, data_digest: str, vae: str | None
) -> Location:
    for old, new in LATENT_JOB.items():
        tiny_job = tiny_job.replace(old, new, 1)
    config = parse(tiny_job, "job.yaml", [f"latents.vae={vae}"] if vae else [])
    weights = build_generator(config).state_dict()
    state = State(32, 0, data_digest, dump(config), {})
    return save_checkpoint(locate(str(tmp_path / "run")), state, {average_group(0.9): weights})


@pytest.mark.parametrize(
    ("same_shards", "vae", "factor", "told"),
    [
        (True, None, 0.25, "a VAE that the run didn't name, times 0.25."),
        (False, None, None, "which factor the training used was not to be found"),
        (None, None, None, "which factor the training used was not to be found"),
        (None, "some/vae", None, "the VAE `some/vae`, times its configuration's `scaling_factor`"),
    ],
)
def test_of_latents_it_is_told_how_they_are_scaled_where_the_shards_tell(
    tmp_path, tiny_job, save_checkpoint, out, same_shards, vae, factor, told
):
    index = Index(
        *("latents", 32, 4, (1,) * 10, "test", (Shard("a.tar", 10, 10**6, "0" * 64),), ""),
        made_with={"scaling_factor": 0.25},
    )
    if same_shards is not None:
        write_index(locate(str(tmp_path / "shards")), index, {"a.tar": np.zeros(11)})
    digest = index.digest() if same_shards else "of others"
    checkpoint = latent_checkpoint(tmp_path, tiny_job, save_checkpoint, digest, vae)
    export(checkpoint, locate(str(out)))
    found = cat_ray.load_generator(out)
    assert (found.description.makes, found.description.vae) == ("latents", vae)
    assert found.description.scaling_factor == factor
    assert found.sample([1]).shape == (1, 4, 32, 32)
    assert told in (out / README).read_text()
    assert "The VAE that decodes the latents has a licence of its own." in (
        (out / README).read_text()
    )


# Samples.


@pytest.mark.parametrize("truncation", [0.0, 0.5])
def test_pictures_are_those_of_cat_ray_sample(checkpoint, exported, tmp_path, truncation):
    write_pictures(checkpoint, locate(str(tmp_path / "pictures")), [3], 4, 5, None, truncation)
    pixels = cat_ray.to_pixels(cat_ray.load_generator(exported).sample([3] * 4, 5, truncation))
    for number, picture in enumerate(pixels):
        path = tmp_path / "pictures" / f"class-0003-seed-5-{number:03d}.png"
        with Image.open(path) as image:
            assert np.array_equal(np.asarray(image), picture[0].numpy())


def test_a_sample_follows_from_seed_class_and_its_number(exported):
    model = cat_ray.load_generator(exported)
    first = model.sample([1, 2, 3], seed=7)
    assert torch.equal(first, model.sample(torch.tensor([1, 2, 3]), seed=7))
    assert torch.equal(first.flip(0), model.sample([3, 2, 1], seed=7, indices=[2, 1, 0]))
    for other in (model.sample([1, 2, 3], seed=8), model.sample([2, 3, 1], seed=7)):
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"labels": [3, 10]}, "class 10 doesn't exist: there are 0 to 9"),
        ({"labels": [-1]}, "class -1 doesn't exist"),
        ({"labels": []}, "0 labels and 0 indices: give as many, and at least one"),
        ({"labels": [1, 2], "indices": [0]}, "2 labels and 1 indices"),
        ({"labels": [1], "truncation": 1.5}, r"truncation 1.5 isn't between 0 and 1"),
    ],
)
def test_what_can_not_be_sampled_is_refused(exported, arguments, told):
    with pytest.raises(BadInput, match=told):
        cat_ray.load_generator(exported).sample(**arguments)


# What is no good export.


@pytest.mark.parametrize("name", [WEIGHTS, CLASS_MEANS])
def test_a_damaged_or_missing_file_is_named(exported, name):
    content = bytearray((exported / name).read_bytes())
    content[-1] ^= 1
    (exported / name).write_bytes(bytes(content))
    with pytest.raises(BadInput, match=f"{name} is damaged: its sha256 is not that of {MODEL}"):
        cat_ray.load_generator(exported)
    (exported / name).unlink()
    with pytest.raises(BadInput, match=f"{name} is missing"):
        cat_ray.load_generator(exported)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ((b'"format": 1', b'"format": 2'), f"has format 2, this cat-ray reads {FORMAT}: install"),
        ((b'"heads": 2', b'"heads": 4'), "is damaged, or was changed"),
        ((b'"digest": ', b'"digits": '), "is damaged: export the checkpoint again"),
        ((b"{", b""), "is damaged: export the checkpoint again"),
        ((b"{", b"[" * 100_000), "is damaged: export the checkpoint again"),
        ((b"{", b"[{}]"), "is damaged: export the checkpoint again"),
    ],
)
def test_a_description_that_can_not_be_read_is_told_of(exported, change, told):
    content = (exported / MODEL).read_bytes()
    (exported / MODEL).write_bytes(content.replace(*change, 1))
    with pytest.raises(BadInput, match=told):
        cat_ray.load_generator(str(exported))


def test_where_there_is_nothing_there_is_no_export(tmp_path):
    with pytest.raises(BadInput, match="absent is no export"):
        cat_ray.load_generator(tmp_path / "absent")


@settings(max_examples=30, deadline=None)
@given(
    st.builds(
        Description,
        generator=st.builds(
            GeneratorShape,
            size=st.builds(Size, *[st.integers(1, 64)] * 3),
            **dict.fromkeys(
                ("patch", "resolution", "channels", "num_classes", "stages", "latent_width"),
                st.integers(1, 4096),
            ),
            mapping_lr_multiplier=st.floats(1e-4, 1.0),
            activation_checkpointing=st.just(False),
            autocast_dtype=st.none(),
        ),
        makes=st.sampled_from(["pictures", "latents"]),
        vae=st.none() | st.text(),
        vae_revision=st.none() | st.text(),
        scaling_factor=st.none() | st.floats(1e-4, 10.0),
        provenance=st.dictionaries(st.text(), st.integers() | st.text()),
        sha256=st.dictionaries(st.text(), st.text()),
    )
)
def test_a_description_is_read_as_it_was_written(description):
    assert parse_description(description.to_json(), "model.json") == description


def test_how_a_network_was_trained_is_not_part_of_its_description(exported):
    described = cat_ray.load_generator(exported).description
    shape = replace(described.generator, activation_checkpointing=True)
    assert replace(described, generator=shape).to_json() == described.to_json()


# With nothing but torch, numpy and safetensors.

ALONE = """
import hashlib, sys
import cat_ray
assert "torch" not in sys.modules, "import cat_ray alone must not import torch"
model = cat_ray.load_generator(sys.argv[1])
for truncation in (0.0, 0.5):
    samples = model.sample([3, 7, 7], seed=5, truncation=truncation)
    print(hashlib.sha256(samples.numpy().tobytes()).hexdigest())
for name in ("ray", "deepspeed", "pydantic", "pyarrow", "yaml", "PIL"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(name + " can be imported: this is no proof")
try:
    cat_ray.load_generator("s3://bucket/exported")
except Exception as error:
    print(error)
"""


def needed(name: str, found: dict[str, Distribution]) -> dict[str, Distribution]:
    """A package and all that it can't do without, by name."""
    if name not in found:
        found[name] = distribution(name)
        for requirement in map(Requirement, found[name].requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needed(requirement.name, found)
    return found


@pytest.fixture
def alone(tmp_path: Path) -> Callable[..., list[str]]:
    """Runs Python with torch, numpy, safetensors, what these need, and cat-ray's own source."""
    site = tmp_path / "site"
    site.mkdir()
    packages: dict[str, Distribution] = {}
    for name in ("torch", "numpy", "safetensors"):
        needed(name, packages)
    for package in packages.values():
        for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            (site / top).symlink_to(package.locate_file(top))
    (site / "cat_ray").symlink_to(Path(cat_ray.__file__).parent)

    def run(code: str, *arguments: object) -> list[str]:
        path = f"import sys; sys.path.append({str(site)!r})\n"
        # Isolated, without the site-packages that this process has.
        command = [sys.executable, "-I", "-S", "-c", path + code, *map(str, arguments)]
        threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        done = subprocess.run(command, capture_output=True, text=True, env=threads)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def test_with_torch_numpy_and_safetensors_alone_the_same_samples_are_made_bit_for_bit(
    exported, checkpoint, alone
):
    cpu = torch.device("cpu")
    generator = load_generator(checkpoint)
    expected = []
    for strength in (None, Truncation(0.5, class_means(generator, cpu))):
        z = latents(5, range(3), 64)
        made = sample_stages(generator, z, torch.tensor([3, 7, 7]), cpu, strength)[-1]
        expected.append(hashlib.sha256(made.numpy().tobytes()).hexdigest())
    *found, last = alone(ALONE, exported)
    assert found == expected
    assert last == "s3://bucket/exported is opened with pyarrow: pip install pyarrow"


# ONNX.


def run_onnx(path: Path, z: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    (made,) = session.run(["output"], {"z": z.numpy(), "labels": labels.numpy()})
    return made


def test_onnx_computes_what_pytorch_does_for_any_batch(checkpoint, out):
    told = export(checkpoint, locate(str(out)), onnx=True)
    assert told.onnx_differs_by is not None
    assert 0 < told.onnx_differs_by <= TOLERANCE
    assert {path.name for path in out.iterdir()} == {WEIGHTS, CLASS_MEANS, README, MODEL, ONNX}
    model = cat_ray.load_generator(out)
    assert ONNX in model.description.sha256
    assert 5 not in COMPARED_BATCHES
    z, labels = torch.randn(5, 64), torch.randint(10, (5,))
    difference = run_onnx(out / ONNX, z, labels) - model.network(z, labels)[-1].numpy()
    assert np.abs(difference).max() <= TOLERANCE
    with torch.no_grad():
        model.network.heads[-1].output.bias += 20 * TOLERANCE
    with pytest.raises(RunFailed, match=r"differs from PyTorch by 0\.002, more than 0\.0001"):
        onnx_graph.differs_by(model.network, out / ONNX)


def test_onnx_that_computes_something_else_is_not_left_behind(checkpoint, out, monkeypatch):
    def written(generator: Generator, folder: Path) -> list[Path]:
        del generator
        (folder / ONNX).write_bytes(b"graph")
        return [folder / ONNX]

    def differs(*_: object) -> float:
        raise RunFailed("it differs")

    monkeypatch.setattr(exporting, "write_onnx", written)
    monkeypatch.setattr(exporting, "differs_by", differs)
    with pytest.raises(RunFailed, match="it differs"):
        export(checkpoint, locate(str(out)), onnx=True)
    assert not out.exists()


def test_without_onnx_it_is_told_what_to_install(checkpoint, out, monkeypatch):
    monkeypatch.setattr(onnx_graph, "find_spec", lambda name: name != "onnx")
    with pytest.raises(BadInput, match=r"needs onnx and onnxscript: pip install '.\[onnx\]'"):
        export(checkpoint, locate(str(out)), onnx=True)
    assert not out.exists()


@pytest.mark.parametrize("large", [False, True])
def test_large_weights_lie_beside_the_graph_and_what_was_not_compared_is_told(
    checkpoint, out, monkeypatch, large
):
    def written(module: nn.Module, inputs: object, path: Path, **how: object) -> None:
        del module, inputs
        path.write_bytes(b"graph")
        if how["external_data"]:
            path.with_name(f"{path.name}.data").write_bytes(b"weights")

    if large:
        monkeypatch.setattr(onnx_graph, "LARGEST_BYTES", 0)
    monkeypatch.setattr(torch.onnx, "export", written)
    monkeypatch.setattr(onnx_graph, "find_spec", lambda name: name != "onnxruntime")
    assert export(checkpoint, locate(str(out)), onnx=True).onnx_differs_by is None
    files = {ONNX, f"{ONNX}.data"} if large else {ONNX}
    assert {path.name for path in out.iterdir()} == {WEIGHTS, CLASS_MEANS, README, MODEL} | files
    text = (out / README).read_text()
    assert all(f"`{name}`" in text for name in files)
    assert "not compared with PyTorch: onnxruntime wasn't installed" in text


# On object storage.


def test_an_export_may_lie_on_object_storage(checkpoint, exported, s3_server):
    uri, endpoint = f"s3://{s3_server.bucket}/exported", s3_server.endpoint_url
    export(checkpoint, locate(uri, endpoint))
    there = cat_ray.load_generator(uri, endpoint_url=endpoint)
    here = cat_ray.load_generator(exported)
    assert there.description.sha256 == here.description.sha256
    assert torch.equal(there.sample([1, 2]), here.sample([1, 2]))
    with pytest.raises(BadInput, match="isn't empty"):
        export(checkpoint, locate(uri, endpoint))
    with pytest.raises(BadInput, match="is no export"):
        cat_ray.load_generator(f"s3://{s3_server.bucket}/absent", endpoint_url=endpoint)


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": []},
        {"generator": {}},
        {"generator": []},
        {"class_means": 3},
    ],
)
def test_a_description_that_is_signed_and_wrong_is_told_of(exported, change):
    values = json.loads((exported / MODEL).read_bytes())
    del values["digest"]
    values |= change
    digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()
    (exported / MODEL).write_text(json.dumps({**values, "digest": digest}))
    with pytest.raises(BadInput, match="is damaged"):
        cat_ray.load_generator(exported)


def test_a_signed_description_of_another_network_is_told_of(exported):
    values = json.loads((exported / MODEL).read_bytes())
    del values["digest"]
    values["generator"]["size"]["depth"] += 1
    digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()
    (exported / MODEL).write_text(json.dumps({**values, "digest": digest}))
    with pytest.raises(BadInput, match=f"{MODEL} tells of another network than"):
        cat_ray.load_generator(exported)
