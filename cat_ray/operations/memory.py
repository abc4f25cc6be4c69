"""What a worker's memory holds, by ZeRO stage: see `training/engines.py` and `averaging.py`.

Everything is fp32 but activations under autocast. DeepSpeed's own buffers are as its version 0.19.8
makes them with our settings (`runtime/zero/stage_1_and_2.py`, `stage3.py`).
"""

from dataclasses import dataclass

from cat_ray.config import Config, Offload
from cat_ray.operations.activations import Networks
from cat_ray.operations.save_size import FLOAT_BYTES, checkpoint_elements
from cat_ray.training.engines import BUCKET_ELEMENTS, PARTITIONED

MOMENTS = 2
# DeepSpeed's default of stage3_max_live_parameters, in elements.
LIVE_ELEMENTS = 1_000_000_000
# DINOv2 ViT-B/14 has 86.6 million parameters (arXiv 2304.07193); others grow with the width squared
# and the depth.
TEACHER_PARAMETERS = {384: 22_100_000, 768: 86_600_000, 1024: 304_400_000, 1536: 1_136_500_000}
# AutoencoderKL with Stable Diffusion's configuration.
ENCODER_PARAMETERS = 83_653_863
# A CUDA context with cuBLAS's workspaces and NCCL's buffers: estimated, not measured here.
GPU_BASE_BYTES = 2_000_000_000
# A train worker's process with a model of next to nothing: peak resident memory (VmHWM) of the two
# of jobs/quickstart.yaml with networks of width 16 (25 November 2026, x86-64, Python 3.11,
# torch 2.13.0, ray 2.60.0, deepspeed 0.19.8): 572 and 583 MiB, of which 4 MB are the model.
CPU_BASE_BYTES = 602_000_000
# Of the card's memory what allocator fragmentation leaves: assumed.
USABLE_SHARE = 0.9


@dataclass(frozen=True)
class WorkerMemory:
    """The most that one worker holds at once, in bytes.

    Attributes:
        weights: of both networks, and under ZeRO 1 to 3 this worker's masters.
        gradients: of both.
        moments: Adam's two of both.
        averages: of the generator.
        buffers: DeepSpeed's buckets and, under ZeRO 3, what is gathered.
        activations: of a step's graphs.
        frozen: DINOv2 and the VAE.
        base: the process: on a GPU its context, on the CPU everything that is imported.
        offloaded: of the host's memory, where the job keeps some of the GPU's there.
    """

    weights: int
    gradients: int
    moments: int
    averages: int
    buffers: int
    activations: int
    frozen: int
    base: int
    offloaded: int = 0

    @property
    def total(self) -> int:
        """All together, without what is offloaded."""
        return sum(vars(self).values()) - self.offloaded


def before_sharding(parameters: int) -> int:
    """Weights, gradients and moments of a network, in bytes, as a single process holds them."""
    return (2 + MOMENTS) * FLOAT_BYTES * parameters


def worker_memory(
    config: Config,
    networks: Networks,
    workers: int,
    stages: tuple[int, int],
    checkpointing: bool,
    gpu: bool,
    offloads: tuple[Offload, Offload] = ("none", "none"),
) -> WorkerMemory:
    """The memory of one of so many workers.

    Args:
        config: the job.
        networks: its networks, counted for the rows of a worker.
        workers: the group's size.
        stages: ZeRO stages of the generator's and the discriminator's engine.
        checkpointing: of activations.
        gpu: whether it is a GPU's memory, or a process's on the CPU, where nothing is offloaded.
        offloads: of the two engines.
    """
    counts = (networks.generator.parameters, networks.discriminator.parameters)
    engines = [
        _engine(count, stage, workers, gpu, offload if gpu else "none")
        for count, stage, offload in zip(counts, stages, offloads, strict=True)
    ]
    weights, gradients, moments, buffers, offloaded = (
        sum(each) for each in zip(*engines, strict=True)
    )
    generator, sharded = counts[0], stages[0] == PARTITIONED
    each_average = FLOAT_BYTES * (_share(generator, workers) if sharded else generator)
    if not gpu:
        # What is being saved is copied first; on a GPU that copy is in the host's memory.
        elements = sum(checkpoint_elements(config, *counts).values())
        buffers += FLOAT_BYTES * _share(elements, workers)
    alignment = config.objective.alignment
    frozen = 0
    if alignment.weight:
        frozen += FLOAT_BYTES * TEACHER_PARAMETERS.get(alignment.teacher_width, 0)
    if config.latents.vae is not None:
        frozen += FLOAT_BYTES * ENCODER_PARAMETERS
    reuse = config.optimisation.reuses_forward(workers)
    return WorkerMemory(
        weights=weights,
        gradients=gradients,
        moments=moments,
        averages=each_average * len(config.optimisation.ema_decays),
        buffers=buffers,
        activations=networks.activations(checkpointing).peak(reuse),
        frozen=frozen,
        base=GPU_BASE_BYTES if gpu else CPU_BASE_BYTES,
        offloaded=offloaded,
    )


def _engine(
    parameters: int, stage: int, workers: int, gpu: bool, offload: Offload
) -> tuple[int, int, int, int, int]:
    """Bytes of weights, gradients, moments and buffers of one engine, and of what is offloaded.

    Two buckets are allocated whole, one for gradients on their way and one that is filled; on the
    CPU only the part that is used takes memory, which under ZeRO 0 and 1 is the gradients
    themselves. The optimiser's masters, moments and this worker's gradients are offloaded together.
    """
    whole, part = FLOAT_BYTES * parameters, FLOAT_BYTES * _share(parameters, workers)
    bucket = FLOAT_BYTES * (2 * BUCKET_ELEMENTS if gpu else min(parameters, BUCKET_ELEMENTS))
    if stage == 0:
        return whole, whole, MOMENTS * whole, 0, 0
    gathered = 0
    if stage == PARTITIONED:
        gathered, whole = FLOAT_BYTES * min(parameters, LIVE_ELEMENTS), part
    # Under ZeRO 1 all gradients are there, and this worker's again in fp32 for the step.
    gradients = whole if stage == 1 else 0
    if stage == 1 and not gpu:
        bucket = 0
    if offload == "none":
        return whole + part, gradients + part, MOMENTS * part, bucket + gathered, 0
    offloaded = (2 + MOMENTS) * part
    if offload == "optimiser":
        return whole, gradients, 0, bucket + gathered, offloaded
    return 0, gradients, 0, bucket + gathered, offloaded + part


def _share(elements: int, workers: int) -> int:
    return -(-elements // workers)
