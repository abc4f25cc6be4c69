"""`cat-ray verify-resume`: trains a few steps undisturbed, then again with kills and with resizes.

What must come out the same is compared: images seen, samples, noise, weights, averages, moments.
"""

from rich.console import Console

from cat_ray.config import Config
from cat_ray.operations.comparison import Compared, compare, tolerance
from cat_ray.storage import Location
from cat_ray.training.driver import cluster, train
from cat_ray.training.faults import Fault

SAVES = 4
STEPS_BETWEEN_SAVES = 3


def verify_resume(config: Config) -> list[Compared]:
    """Trains the job's first steps three times, in folders beside the run's, and compares.

    Raises:
        BadInput: the job can't be used, or one of the folders isn't empty.
    """
    batch = config.optimisation.batch_size
    apart = STEPS_BETWEEN_SAVES * batch
    total = SAVES * apart
    largest = min(config.workers.maximum + 1, config.optimisation.lanes)
    config = config.model_copy(
        update={
            "checkpoints": config.checkpoints.model_copy(
                update={"save_every_images": apart, "keep": SAVES}
            ),
            "reporting": config.reporting.model_copy(
                update={
                    "sample_keys": True,
                    "grid_every_images": total,
                    "log_every_images": apart,
                    "trackers": (),
                }
            ),
            "evaluation": config.evaluation.model_copy(update={"protocol": "none"}),
        }
    )
    workers = config.workers.maximum
    kills = tuple(Fault("kill", save * apart + batch, save % workers) for save in range(1, SAVES))
    sizes = [workers, 1, largest, workers]
    told, console = "-".join(map(str, sizes)), Console()
    with cluster(_part(config, "largest", total, largest)):
        console.rule("undisturbed")
        undisturbed = _trained(_part(config, "undisturbed", total, workers))
        console.rule(f"killed {len(kills)} times on purpose: Ray reports workers that died")
        killed = _trained(_part(config, "killed", total, workers), kills)
        console.rule(f"resized: {told} workers")
        for save, size in enumerate(sizes, start=1):
            resized = _trained(_part(config, "resized", save * apart, size))
    allowed = tolerance(_part(config, "resized", total, workers))
    return [
        *compare(f"{len(kills)} kills, {workers} workers", undisturbed, killed, None),
        *compare(f"{told} workers", undisturbed, resized, allowed),
    ]


def _part(config: Config, name: str, total_images: int, workers: int) -> Config:
    return config.model_copy(
        update={
            "run": config.run.model_copy(
                update={
                    "folder": f"{config.run.folder}-verify-resume/{name}",
                    "total_images": total_images,
                }
            ),
            "workers": config.workers.model_copy(
                update={"minimum": workers, "maximum": workers, "max_failures": SAVES}
            ),
        }
    )


def _trained(config: Config, faults: tuple[Fault, ...] = ()) -> Location:
    run = config.storage.locate(config.run.folder)
    train(config, faults)
    return run
