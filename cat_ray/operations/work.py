"""How many operations a training step takes for each image, from the networks' shapes.

Counted are multiplications with their additions (MAC) in linear layers and attention, the rest is
less than a hundredth. A backward pass takes two times the forward pass; through frozen weights only
the gradient of the inputs is taken, which is one time for a linear layer.
"""

from dataclasses import dataclass

from cat_ray.config import Config
from cat_ray.data.latent_shape import REDUCTION
from cat_ray.model.layers import padded
from cat_ray.model.sizes import Size

GIGA = 1e9
# Depth of DINOv2's sizes by width, and the patches of a 224 pixel image (arXiv 2304.07193).
TEACHER_DEPTHS = {384: 12, 768: 12, 1024: 24, 1536: 40}
TEACHER_PATCHES, TEACHER_PATCH_VALUES = 16 * 16, 14 * 14 * 3
# FlopCounterMode on the encoder of diffusers' AutoencoderKL with Stable Diffusion's configuration,
# for a picture of 256 x 256 (25 November 2026).
ENCODER_MACS, ENCODER_SIDE = 136.36e9, 256
# Of these, the attention of its 32 x 32 places, 512 wide: it grows with their square.
ENCODER_ATTENTION_MACS = 2 * 32**4 * 512


@dataclass(frozen=True)
class Pass:
    """A forward pass for one image, in MAC; `blocks` are what activation checkpointing repeats."""

    blocks_linear: float
    blocks_attention: float
    rest: float

    @property
    def forward(self) -> float:
        """All of it."""
        return self.blocks + self.rest

    @property
    def blocks(self) -> float:
        """The transformer's blocks."""
        return self.blocks_linear + self.blocks_attention

    @property
    def backward(self) -> float:
        """The gradient of weights and inputs."""
        return 2 * self.forward

    @property
    def backward_frozen(self) -> float:
        """The gradient of the inputs alone."""
        return self.blocks_linear + 2 * self.blocks_attention + self.rest


@dataclass(frozen=True)
class Work:
    """The operations of a training step for each image of the batch, in MAC.

    Attributes:
        generator: its forward passes and the backward pass.
        discriminator_step: reals and fakes, forward and backward.
        penalty: of the discriminator's step, the perturbed images of R1 and R2.
        generator_step: the frozen discriminator in the generator's step.
        recompute: what activation checkpointing does again.
        teacher: DINOv2 on the real images.
        encoder: the VAE on the real images.
    """

    generator: float
    discriminator_step: float
    penalty: float
    generator_step: float
    recompute: float
    teacher: float
    encoder: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(vars(self).values())


def generator_pass(config: Config) -> Pass:
    """The generator, for one image."""
    model = config.model
    size, patch = model.generator.dimensions(), model.generator.patch
    width, tokens = size.width, (model.resolution // patch) ** 2
    modulation = size.depth * 6 * width * width
    head = tokens * width * patch * patch * model.channels + 2 * width * width
    mapping = 2 * model.generator.latent_width * width + width * width
    return Pass(
        blocks_linear=_linear(size, tokens) + modulation,
        blocks_attention=_attention(size, [tokens]),
        rest=model.stages * head + mapping,
    )


def discriminator_pass(config: Config) -> Pass:
    """The discriminator, for one image at all scales; the alignment's projector is not in it."""
    model = config.model
    network = model.discriminator
    size, patch, projection = network.dimensions(), network.patch, network.projection_width
    patches = [(side // patch) ** 2 for side in model.scales()]
    lengths = [count + 1 for count in patches]
    segments = lengths if network.scope == "scale_wise" else [sum(lengths)]
    embedding = sum(patches) * model.channels * patch * patch * size.width
    # The last is the product with the class vector.
    head = model.stages * size.width * projection + 2 * projection**2 + model.stages * projection
    return Pass(
        blocks_linear=_linear(size, sum(lengths)),
        blocks_attention=_attention(size, segments),
        rest=embedding + head,
    )


def projector_macs(config: Config) -> float:
    """The projector of the alignment, forward, for one real image; 0 where alignment is off."""
    if not config.objective.alignment.weight:
        return 0.0
    network, target = config.model.discriminator, config.objective.alignment.teacher_width
    tokens = (config.model.resolution // network.patch) ** 2 + 1
    hidden = network.projection_width
    return tokens * (network.dimensions().width * hidden + hidden * hidden + hidden * target)


def teacher_macs(width: int) -> float:
    """A DINOv2 ViT/14 of this width on one image of 224 x 224."""
    size = Size(depth=TEACHER_DEPTHS.get(width, 12), width=width, heads=1)
    tokens = TEACHER_PATCHES + 1
    # Its feed-forward has four times the width: eight widths squared, as SwiGLU's three by 8/3.
    blocks = size.depth * tokens * 12 * width * width + _attention(size, [tokens])
    return blocks + TEACHER_PATCHES * TEACHER_PATCH_VALUES * width


def work_of(config: Config, workers: int | None = None) -> Work:
    """The operations of one step for each image, as `cat_ray/training/steps.py` takes it.

    Args:
        config: the job.
        workers: that share the batch; `workers.maximum` if None. Where a worker's lanes don't go
            through the networks at once, the generator makes the fakes twice.
    """
    optimisation, alignment = config.optimisation, config.objective.alignment
    g, d = generator_pass(config), discriminator_pass(config)
    reuse = optimisation.reuses_forward(workers or config.workers.maximum)
    generator_forwards = 1 if reuse else 2
    penalised = 2 * config.penalised_per_lane() / optimisation.lane_size
    # Real and fake, and both again with noise in the discriminator's step; in the generator's the
    # fakes, and the reals without a gradient.
    judged, judged_again = 2.0, 1.0
    recompute = 0.0
    if optimisation.activation_checkpointing:
        recompute = g.blocks + (judged + penalised + judged_again) * d.blocks
    encoded = config.latents.vae is not None
    return Work(
        generator=generator_forwards * g.forward + g.backward,
        discriminator_step=judged * (d.forward + d.backward) + 3 * projector_macs(config),
        penalty=penalised * (d.forward + d.backward),
        generator_step=d.forward + judged_again * (d.forward + d.backward_frozen),
        recompute=recompute,
        teacher=teacher_macs(alignment.teacher_width) if alignment.weight else 0.0,
        encoder=_encoder_macs(REDUCTION * config.model.resolution) if encoded else 0.0,
    )


def _encoder_macs(side: int) -> float:
    area = (side / ENCODER_SIDE) ** 2
    return (ENCODER_MACS - ENCODER_ATTENTION_MACS) * area + ENCODER_ATTENTION_MACS * area**2


def images_per_gpu_second(
    config: Config, peak_teraflops: float, utilisation: float, workers: int
) -> float:
    """How many images a GPU, one of so many workers, trains on, at a share of its peak (0 to 1),
    recomputing included."""
    return peak_teraflops * 1e12 * utilisation / (2 * work_of(config, workers).total)


def _linear(size: Size, tokens: int) -> float:
    """The linear layers of all blocks: attention's four and SwiGLU's three."""
    hidden = padded(8 * size.width // 3)
    return size.depth * tokens * (4 * size.width**2 + 3 * hidden * size.width)


def _attention(size: Size, lengths: list[int]) -> float:
    """Queries with keys, and weights with values, of all blocks."""
    return size.depth * sum(2 * length * length * size.width for length in lengths)
