"""The README of an exported generator: what it is, how it is used, where it comes from."""

from cat_ray.exported import CLASS_MEANS, MODEL, WEIGHTS, Description
from cat_ray.operations.onnx_graph import ONNX, TOLERANCE

README = "README.md"

CARD = """# A CAT generator

It makes {outputs}, {channels} x {resolution} x {resolution}, of {classes:,} classes, in one forward
pass: a transformer of depth {depth}, width {width}, {heads} heads and patch {patch}, in {stages}
stages (Cross-scale Aligned Transformer, arXiv 2605.26449), trained with cat-ray.

## How to load it

With cat-ray's source, and neither Ray nor DeepSpeed:

```sh
pip install torch numpy safetensors && pip install --no-deps PATH_TO_CAT_RAY
```

```python
import cat_ray

model = cat_ray.load_generator("PATH_TO_THIS_FOLDER")
samples = model.sample(labels=[0, 1, 1], seed=0, truncation=0.0)  # [3, {channels}, {resolution}, \
{resolution}]
{decode}
```

`truncation` draws styles towards the mean of their class: 0 leaves them, 1 gives the mean
(StyleGAN's psi is 1 - truncation). A sample is a function of seed, class and its number in the
call; `cat-ray sample` on the checkpoint makes the same ones. {space}

## Files

| file | what it is |
|---|---|
{files}

## Where it comes from

| | |
|---|---|
{provenance}

The hashes are of the checkpoint's `manifest.json`, of the resolved configuration, and of the list
of the shards that it was trained on with their own hashes.

## Licence

The code of cat-ray is under the Apache License 2.0. It says nothing about these weights. What they
may be used for follows from what they were trained on, which whoever trained them knows: ImageNet,
for one, is given for non-commercial research and education. {vae_licence}Whoever passes this folder
on should say here what it was trained on, and under which terms.
"""

PICTURES = "pixels = cat_ray.to_pixels(samples)  # uint8"
LATENTS = """\
vae = diffusers.AutoencoderKL.from_pretrained({vae})  # import diffusers
pixels = cat_ray.to_pixels(vae.decode(samples / {factor}).sample)  # uint8"""


def model_card(description: Description, onnx_differs_by: float | None) -> str:
    """The file's content, as Markdown."""
    shape = description.generator
    latents = description.makes == "latents"
    return CARD.format(
        outputs="latents of a VAE" if latents else "pictures",
        channels=shape.channels,
        resolution=shape.resolution,
        classes=shape.num_classes,
        depth=shape.size.depth,
        width=shape.size.width,
        heads=shape.size.heads,
        patch=shape.patch,
        stages=shape.stages,
        decode=_decoding(description) if latents else PICTURES,
        space=_space(description) if latents else "Pictures have values in [-1, 1].",
        files="\n".join(_files(description, onnx_differs_by)),
        provenance="\n".join(_provenance(description)),
        vae_licence="The VAE that decodes the latents has a licence of its own. "
        if latents
        else "",
    )


def _decoding(description: Description) -> str:
    arguments = repr(description.vae or "THE_VAE")
    if description.vae_revision:
        arguments += f", revision={description.vae_revision!r}"
    factor = description.scaling_factor
    return LATENTS.format(vae=arguments, factor=factor or "vae.config.scaling_factor")


def _space(description: Description) -> str:
    if description.scaling_factor is None:
        scale = (
            "what their own VAE's configuration calls `scaling_factor`; which factor the training "
            "used was not to be found when this was exported"
        )
        if description.vae is not None:
            scale = "its configuration's `scaling_factor`"
    else:
        scale = f"{description.scaling_factor}"
    vae = f"the VAE `{description.vae}`" if description.vae else "a VAE that the run didn't name"
    return f"Latents are those of {vae}, times {scale}."


def _files(description: Description, onnx_differs_by: float | None) -> list[str]:
    about = {
        WEIGHTS: "weights, fp32, by parameter name",
        CLASS_MEANS: "the mean style of each class, for truncation",
        MODEL: "the network's shape, provenance, sha256 of the files of tensors",
    }
    if ONNX in description.sha256:
        checked = (
            "not compared with PyTorch: onnxruntime wasn't installed"
            if onnx_differs_by is None
            else f"at most {onnx_differs_by:.1g} from PyTorch with onnxruntime "
            f"(allowed: {TOLERANCE:g})"
        )
        about[ONNX] = (
            "the same network without truncation: `z` [batch, latent_width] fp32, standard normal, "
            f"and `labels` [batch] int64 to `output`; {checked}"
        )
    for name in description.sha256.keys() - about.keys():
        about[name] = f"weights of `{ONNX}`"
    return [f"| `{name}` | {what} |" for name, what in about.items()]


def _provenance(description: Description) -> list[str]:
    found = description.provenance
    decay = found["decay"]
    rows = {
        "checkpoint": f"`{found['checkpoint']}`",
        "images seen": f"{found['images_seen']:,}",
        "weights": f"their average with decay {decay}" if decay else "raw, without an average",
        "seed of the run": found["seed"],
        "manifest, sha256": f"`{found['manifest_sha256']}`",
        "configuration, sha256": f"`{found['config_sha256']}`",
        "data, sha256": f"`{found['data_sha256']}`",
        "trained with": _listed(found["trained_with"]),
        "exported with": _listed(found["exported_with"]),
    }
    return [f"| {name} | {value} |" for name, value in rows.items()]


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
