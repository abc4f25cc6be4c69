"""A plan as tables for people and as JSON for programs."""

import math
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from cat_ray.config import Config
from cat_ray.operations.memory import WorkerMemory
from cat_ray.operations.plan import Plan, Price, usable_bytes

GIGA = 1e9
PARTS = tuple(field.name for field in fields(WorkerMemory) if field.name != "offloaded")
SHORT = {"gradients": "grads", "averages": "EMA", "activations": "activ."}


def plan_tables(plan: Plan, config: Config) -> Iterator[RenderableType]:
    """The plan, to read at 100 columns."""
    yield _summary(plan, config)
    yield _memory(plan)
    yield _work(plan)
    yield _saves(plan)
    if plan.problems:
        table = Table("what will not fit, and what to change", title_justify="left")
        for problem in plan.problems:
            table.add_row(f"[red]{problem}[/red]")
        yield table
    else:
        yield "everything fits"


def plan_values(plan: Plan) -> dict[str, Any]:
    """The plan in bytes, MAC, seconds and dollars, for JSON."""
    gpu = plan.assumptions.gpu
    values = asdict(plan)
    values["assumptions"]["gpu"] = gpu.model_dump(mode="json") if gpu else None
    for setting, own in zip(values["settings"], plan.settings, strict=True):
        setting["memory"]["total"] = own.memory.total
    values["job"]["memory"]["total"] = plan.job.memory.total
    values["work"]["total"] = plan.work.total
    values["data"]["bytes_per_second"] = plan.data.bytes_per_second
    return finite(values)


def finite(values: Any) -> Any:
    """The same with None for infinities, which JSON doesn't have."""
    if isinstance(values, dict):
        return {name: finite(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and math.isinf(values) else values


def duration(seconds: float | None) -> str:
    """Seconds as people say them."""
    if seconds is None:
        return "unknown"
    if math.isinf(seconds):
        return "never"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _summary(plan: Plan, config: Config) -> Table:
    assumed, gpu = plan.assumptions, plan.assumptions.gpu
    generator, discriminator = plan.networks.generator, plan.networks.discriminator
    kind = f"{assumed.workers} x {gpu.name}" if gpu else f"{assumed.workers} processes on the CPU"
    table = Table(
        "",
        "",
        title=f"{config.run.total_images:,} images on {kind}",
        show_header=False,
        title_justify="left",
    )
    table.add_row(
        "parameters",
        f"generator {_millions(generator.parameters)}, discriminator "
        f"{_millions(discriminator.parameters)}",
    )
    table.add_row(
        "before sharding",
        "weights, gradients and Adam in fp32: "
        f"{_gigabytes(plan.before_sharding[0])} + {_gigabytes(plan.before_sharding[1])}, "
        f"averages {_gigabytes(plan.averages)}",
    )
    if plan.images_per_second is None or plan.hours is None:
        table.add_row(
            "time", "unknown on a CPU: name a GPU type with --gpu, or measure a short run"
        )
    else:
        table.add_row(
            "time, estimated",
            f"{plan.hours:,.1f} h, {plan.hours * assumed.workers:,.0f} GPU-hours, at "
            f"{assumed.utilisation:.0%} of {gpu.peak_teraflops if gpu else 0:,.0f} TFLOP/s, what "
            "is computed again included",
        )
    for name, price in (("on demand", plan.on_demand), ("spot, no loss", plan.spot)):
        table.add_row(name, _told_price(price))
    data = plan.data
    rate = ""
    if data.bytes_per_second is not None:
        rate = f"{data.images_per_second:,.0f} images/s, {data.bytes_per_second / 1e6:,.1f} MB/s, "
    table.add_row(
        "from storage", f"{rate}{data.bytes_per_image / 1e3:,.1f} KB each ({data.source})"
    )
    return table


def _told_price(price: Price) -> str:
    if price.per_hour is None:
        return price.source
    rate = f"${price.per_hour:,.2f} per worker and hour ({price.source})"
    return rate if price.total is None else f"${price.total:,.0f}, {rate}"


# By what is offloaded, with the ZeRO stage.
OFFLOADED_NAMES = {"none": "{}", "optimiser": "{}-", "all": "{}--"}


def _memory(plan: Plan) -> Table:
    gpu = plan.assumptions.gpu
    unit, name = (GIGA, "GB") if plan.job.memory.total >= GIGA else (1e6, "MB")
    title = f"memory of one worker, {name}"
    if gpu is not None:
        title += (
            f"; {usable_bytes(gpu) / GIGA:.0f} of a {gpu.name}'s {gpu.memory_gigabytes:g} usable"
        )
    table = Table("ZeRO", "blocks", title=title, title_justify="left")
    for part in (*PARTS, "total"):
        table.add_column(SHORT.get(part, part), justify="right", no_wrap=True)
    settings = plan.settings if plan.job in plan.settings else (*plan.settings, plan.job)
    for setting in settings:
        engines = zip(setting.zero_stages, setting.offloads, strict=True)
        names = [OFFLOADED_NAMES[offload].format(stage) for stage, offload in engines]
        mark = " *" if setting == plan.job else ""
        told = "again" if setting.checkpointing else "kept"
        fits = gpu is None or setting.memory.total <= usable_bytes(gpu)
        sizes = _sizes(setting.memory, "" if fits else "[red]", unit)
        table.add_row(f"{'/'.join(dict.fromkeys(names))}{mark}", told, *sizes)
    notes = [
        "* the job",
        "again: blocks are computed again, optimisation.activation_checkpointing",
        "EMA: averages",
    ]
    if gpu is not None:
        notes.append("red: does not fit")
    if any(set(setting.offloads) != {"none"} for setting in settings):
        notes.append("1-: the optimiser's state is in the host's memory, 3--: all is, offload")
    table.caption = ". ".join(notes)
    table.caption_justify = "left"
    return table


def _sizes(memory: WorkerMemory, colour: str, unit: float) -> list[str]:
    sizes = [getattr(memory, part) for part in (*PARTS, "total")]
    return [f"{colour}{size / unit:.2f}" for size in sizes]


def _work(plan: Plan) -> Table:
    table = Table("operations for each image", title_justify="left")
    table.add_column("GMAC", justify="right")
    table.add_column("share", justify="right")
    work = plan.work
    for name, value in asdict(work).items():
        if value:
            table.add_row(name.replace("_", " "), _macs(value), f"{value / work.total:.0%}")
    table.add_section()
    table.add_row("all", _macs(work.total), "")
    return table


def _saves(plan: Plan) -> Table:
    saves, assumed = plan.checkpoint, plan.assumptions
    table = Table("checkpoint", "", show_header=True)
    plural = "s" * (assumed.machines > 1)
    table.add_row("size", _gigabytes(saves.bytes))
    table.add_row(
        "a save, estimated",
        f"holds training up for {duration(saves.times.stall)} at most; complete after "
        f"{duration(saves.times.stored)} ({assumed.machines} machine{plural})",
    )
    table.add_row("to read it again, estimated", duration(saves.times.restore))
    table.add_row(
        "best interval",
        f"{duration(saves.best_seconds)}{_images(saves.best_images)}: the longer of Young and "
        f"Daly's {duration(saves.young_daly_seconds)} and the time of a save",
    )
    table.add_row(
        "",
        "sqrt(2 x stall x time between interruptions), "
        f"{assumed.interruptions_per_hour:g} per hour (Young 1974, Daly 2006)",
    )
    own = "" if saves.job_seconds is None else f"{duration(saves.job_seconds)}, "
    table.add_row("the job's", f"{own}checkpoints.save_every_images {saves.job_images:,}")
    return table


def _images(count: int | None) -> str:
    return "" if count is None else f", {count:,} images"


def _gigabytes(size: float) -> str:
    return f"{size / GIGA:,.1f} GB" if size >= GIGA else f"{size / 1e6:,.1f} MB"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M"


def _macs(value: float) -> str:
    return f"{value / GIGA:,.1f}" if value >= GIGA else f"{value / GIGA:.4f}"
