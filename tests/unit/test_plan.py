"""`cat-ray plan`: its figures are those of the networks, the training step and the checkpoints."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from cat_ray.checkpoint.layout import DISCRIMINATOR, GENERATOR
from cat_ray.cli import app
from cat_ray.config import Config, parse
from cat_ray.data.index import INDEX_NAME, Index, Shard
from cat_ray.errors import BadInput
from cat_ray.model.build import build_discriminator, build_generator
from cat_ray.operations.activations import Rows, count_networks, rows_of
from cat_ray.operations.data_need import data_need
from cat_ray.operations.gpus import find_gpu, known_gpus
from cat_ray.operations.memory import before_sharding, worker_memory
from cat_ray.operations.plan import Assumptions, Plan, make_plan
from cat_ray.operations.save_size import (
    Rates,
    best_interval_seconds,
    checkpoint_bytes,
    checkpoint_elements,
    save_times,
    slice_count,
)
from cat_ray.operations.work import (
    discriminator_pass,
    generator_pass,
    projector_macs,
    teacher_macs,
    work_of,
)
from cat_ray.training.lanes import micro_batches

CAT_H2 = """
run: {folder: runs/h2, total_images: 76869632}
data: {shards: "s3://bucket/latents", num_classes: 1000}
model: {generator: {size: H}}
objective: {penalty: {share: 0.25}}
workers: {minimum: 8, maximum: 8, gpu: true}
"""
SMALL = """
run: {folder: x, total_images: 64}
data: {shards: nowhere, num_classes: 10}
model:
  resolution: 16
  generator: {size: {depth: 8, width: 32, heads: 2}}
  discriminator: {size: {depth: 3, width: 48, heads: 2}, patch: 2, projection_width: 24}
  stages: 2
optimisation: {batch_size: 16, lanes: 4}
"""


def job(text: str, *overrides: str) -> Config:
    return parse(text, "job.yaml", overrides)


def planned(config: Config, gpu: str | None, workers: int) -> Plan:
    found = find_gpu(gpu) if gpu else None
    return make_plan(config, Assumptions(found, workers, 8, 0.25, 1.0, Rates()))


@pytest.fixture(scope="module")
def h2() -> Plan:
    return planned(job(CAT_H2), "H100", 8)


def small(*overrides: str) -> Config:
    return job(SMALL, *overrides)


# What method.md says of CAT-H/2.


def test_the_parameters_are_the_papers(h2: Plan):
    networks = h2.networks
    assert networks.generator.parameters == pytest.approx(959.8e6, rel=1e-3)
    assert networks.discriminator.parameters == pytest.approx(97.1e6, rel=1e-3)
    aligned = job(CAT_H2, "objective.alignment.weight=1.0")
    # Counted without its rows: they need no more parameters.
    counted = count_networks(aligned, Rows(1, 1, 1, 1), None).discriminator.parameters
    assert counted == pytest.approx(104.4e6, rel=1e-3)


def test_the_memory_before_sharding_is_that_of_the_method(h2: Plan):
    assert h2.before_sharding[0] == pytest.approx(15.4e9, rel=0.01)
    assert h2.averages == pytest.approx(3.8e9, rel=0.02)
    assert h2.checkpoint.bytes == pytest.approx(16.6e9, rel=0.01)


def test_the_operations_are_those_of_the_method():
    config = job(CAT_H2)
    g, d = generator_pass(config).forward / 1e9, discriminator_pass(config).forward / 1e9
    assert g == pytest.approx(166.5 + 0.3, rel=0.002)
    assert d == pytest.approx(30.5, rel=0.005)
    assert teacher_macs(768) / 1e9 == pytest.approx(23, rel=0.02)
    # Its step makes the fakes twice.
    aligned = job(CAT_H2, "objective.alignment.weight=1", "optimisation.reuse_generator_forward=0")
    without_projector = work_of(aligned).total / 1e9 - 3 * projector_macs(aligned) / 1e9
    assert without_projector == pytest.approx(1010, rel=0.01)


def test_the_h2_run_needs_checkpointing_on_eight_h100(h2: Plan):
    told = h2.problems[0]
    assert "activation_checkpointing to true" in told
    fits = planned(job(CAT_H2, "optimisation.activation_checkpointing=true"), "H100", 8)
    assert not any("can use of a H100" in problem for problem in fits.problems)
    assert fits.work.recompute > 0
    assert fits.hours is not None and h2.hours is not None and fits.hours > h2.hours


# The networks and the step themselves.


def macs(network: nn.Module, *inputs: object) -> float:
    """MAC of a forward pass of one image, counted by PyTorch."""
    counter = FlopCounterMode(display=False)
    # Only this attention is counted on every device.
    with counter, sdpa_kernel(SDPBackend.MATH):
        network(*inputs)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("scope", ["scale_wise", "aggregated"])
@pytest.mark.parametrize("alignment", [0.0, 1.0])
def test_the_operations_are_those_that_pytorch_counts(scope: str, alignment: float):
    config = small(f"model.discriminator.scope={scope}", f"objective.alignment.weight={alignment}")
    generator, discriminator = build_generator(config), build_discriminator(config)
    label = torch.zeros(1, dtype=torch.long)
    pyramid = [torch.zeros(1, 4, side, side) for side in config.model.scales()]
    counted = macs(generator, torch.zeros(1, config.model.generator.latent_width), label)
    assert generator_pass(config).forward == pytest.approx(counted, rel=1e-9)
    counted = macs(discriminator, pyramid, label, int(alignment))
    found = discriminator_pass(config).forward + projector_macs(config)
    assert found == pytest.approx(counted, rel=1e-9)


def test_the_penalty_s_share_and_checkpointing_change_the_operations():
    plain, shared = work_of(small()), work_of(small("objective.penalty.share=0.25"))
    assert shared.penalty == pytest.approx(plain.penalty / 4)
    assert work_of(small("optimisation.activation_checkpointing=true")).recompute > 0
    again = work_of(small("optimisation.reuse_generator_forward=false"))
    assert again.generator == pytest.approx(plain.generator * 4 / 3)


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("most", [None, 2, 3, 4, 7])
@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_a_forward_of_the_generator_is_counted_as_often_as_the_step_makes_it(reuse, most, workers):
    setting = "null" if most is None else most
    config = small(
        f"optimisation.micro_batch_lanes={setting}",
        f"optimisation.reuse_generator_forward={reuse}",
        f"workers.maximum={workers}",
    )
    lanes, g = config.optimisation.lanes, generator_pass(config)
    # As `training_step` asks.
    parts = max(len(micro_batches(lanes, workers, rank, most)) for rank in range(workers))
    forwards = 1 if reuse and parts == 1 else 2
    assert work_of(config, workers).generator == pytest.approx(forwards * g.forward + g.backward)
    assert work_of(config) == work_of(config, workers)


def test_a_plan_counts_for_the_workers_that_it_is_for():
    config = small("optimisation.micro_batch_lanes=2", "workers.maximum=4")
    one, four = (planned(config, "H100", workers) for workers in (1, 4))
    assert one.work.generator > four.work.generator
    assert one.images_per_second is not None and four.images_per_second is not None
    assert four.images_per_second > 4 * one.images_per_second


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_saves_of_the_whole_networks(checkpointing: bool):
    config = small(f"optimisation.activation_checkpointing={checkpointing}")
    rows = rows_of(config, 2)
    networks = count_networks(config, rows, None)
    generator = build_generator(config)
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    labels = torch.zeros(rows.generated, dtype=torch.long)
    latents = torch.zeros(rows.generated, config.model.generator.latent_width)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = generator(latents, labels)
    assert outputs.requires_grad
    own = {p.untyped_storage().data_ptr() for p in (*generator.parameters(), *generator.buffers())}
    found = sum(storage.nbytes() for place, storage in saved.items() if place not in own)
    counted = networks.generator
    expected = counted.checkpointed - counted.block if checkpointing else counted.saved
    assert expected == pytest.approx(found, rel=0.01)
    assert counted.parameters == sum(p.numel() for p in generator.parameters())
    assert counted.tensors == len(list(generator.parameters()))


def test_a_worker_s_rows_are_those_of_the_one_with_the_most_lanes():
    config = small("objective.penalty.share=0.5")
    assert rows_of(config, 4) == Rows(generated=4, judged=12, judged_again=4, aligned=0)
    assert rows_of(config, 3) == Rows(generated=8, judged=24, judged_again=8, aligned=0)


# Memory.


@given(st.integers(1, 512), st.sampled_from([1, 2, 3]), st.booleans())
def test_sharding_more_never_takes_more_of_what_is_sharded(workers, stage, checkpointing):
    config, networks = small(), SMALL_NETWORKS
    less = worker_memory(config, networks, workers, (stage, stage), checkpointing, True)
    more = worker_memory(config, networks, workers + 1, (stage, stage), checkpointing, True)
    assert more.moments <= less.moments
    assert more.gradients <= less.gradients
    assert more.weights <= less.weights
    whole = worker_memory(config, networks, workers, (0, 0), checkpointing, True)
    assert less.moments <= whole.moments
    assert less.averages <= whole.averages


SMALL_NETWORKS = count_networks(small(), rows_of(small(), 2), None)


def test_averages_are_whole_on_every_worker_but_under_zero_3():
    config = small("optimisation.ema_decays=[0.9, 0.5]")
    count = SMALL_NETWORKS.generator.parameters
    for stage, held in ((0, 8 * count), (1, 8 * count), (2, 8 * count), (3, 2 * count)):
        memory = worker_memory(config, SMALL_NETWORKS, 4, (stage, stage), False, True)
        assert memory.averages == held
    assert before_sharding(count) == 16 * count


# Checkpoints.


def test_a_checkpoint_is_as_large_as_a_real_one(tmp_path: Path, tiny_job: str, save_checkpoint):
    """All groups of a state, saved by the real writer, with the real networks."""
    from cat_ray.checkpoint.layout import State
    from cat_ray.config import dump
    from cat_ray.storage import locate

    # Large enough for values to outweigh what is written about them.
    wide = ("model.generator.size={depth: 4, width: 128, heads: 2}",)
    config = parse(tiny_job, "job.yaml", wide)
    generator, discriminator = build_generator(config), build_discriminator(config)
    weights = {GENERATOR: dict(generator.named_parameters())}
    weights[DISCRIMINATOR] = dict(discriminator.named_parameters())
    groups = {
        group: {
            f"{name}.{place}": parameter.detach()
            for name, parameter in weights[group.split(".")[0]].items()
            for place in range(2 if group.endswith("moments") else 1)
        }
        for group in checkpoint_elements(config, 0, 0)
    }
    state = State(32, 0, "digest", dump(config), {"python": "3"})
    folder = save_checkpoint(locate(str(tmp_path / "run")), state, groups)
    g, d = (list(network.parameters()) for network in (generator, discriminator))
    found = checkpoint_bytes(
        config,
        sum(p.numel() for p in g),
        sum(p.numel() for p in d),
        slice_count(config, len(g), len(d), 1),
    )
    assert found == pytest.approx(sum(folder.sizes().values()), rel=0.02)


def test_saves_are_shared_out_over_machines():
    rates = Rates(copy=1e3, disk=1e3, upload=1e2, restore=1e2)
    one, four = (save_times(16_000, 500.0, 8, machines, rates) for machines in (1, 4))
    assert one.stored == pytest.approx(16 + 160)
    assert four.stored == pytest.approx(one.stored / 4)
    assert one.stall == pytest.approx(2)
    # Checked by the driver, and read by the workers of a machine each for itself.
    assert (one.restore, four.restore) == (160 + 40, 160 + 10)


@pytest.mark.parametrize(
    ("stall", "per_hour", "seconds"),
    # field-notes.md C.2: 6 s and 1 s at one interruption per hour.
    [(6.0, 1.0, 208), (1.0, 1.0, 85), (1.0, 0.0, math.inf)],
)
def test_the_interval_is_young_s_and_daly_s(stall: float, per_hour: float, seconds: float):
    assert best_interval_seconds(stall, per_hour) == pytest.approx(seconds, rel=0.01)


@given(st.floats(0.01, 100), st.floats(0.001, 60))
def test_no_other_interval_loses_less_to_first_order(stall: float, per_hour: float):
    between = 3600 / per_hour

    def loss(interval: float) -> float:
        return stall / interval + interval / (2 * between)

    best = best_interval_seconds(stall, per_hour)
    assert all(loss(best) <= loss(best * factor) for factor in (0.5, 0.9, 1.1, 2))


# The table of GPUs, the data, and the command.


def test_every_gpu_has_a_source_and_a_date():
    for gpu in known_gpus().values():
        assert gpu.source and gpu.date.year >= 2026
        if gpu.spot_per_gpu_hour and gpu.on_demand_per_gpu_hour:
            assert gpu.spot_per_gpu_hour < gpu.on_demand_per_gpu_hour
    with pytest.raises(BadInput, match="known are cpu, H100"):
        find_gpu("H1000")


def test_prices_are_the_job_s_where_it_has_some(h2: Plan):
    own = planned(small("cost.spot_per_gpu_hour=1.0"), "H100", 2)
    assert own.hours is not None
    assert own.spot.total == pytest.approx(2 * own.hours)
    assert h2.spot.source.startswith("indicative list price")


def test_latents_need_sixteen_kibibytes_each_and_shards_at_hand_are_looked_at(tmp_path: Path):
    need = data_need(job(CAT_H2), 1000.0)
    assert need.bytes_per_image == 16 * 1024
    assert need.bytes_per_second == pytest.approx(16.4e6, rel=0.01)
    shards = (Shard("train-000000.tar", 10, 30_000, ""), Shard("train-000001.tar", 20, 30_000, ""))
    index = Index("images", 32, 1, (15, 15), "a test", shards, "")
    (tmp_path / INDEX_NAME).write_bytes(index.to_json())
    here = data_need(job(CAT_H2, f"data.shards={tmp_path}"), None)
    assert (here.bytes_per_image, here.bytes_per_second) == (2000, None)
    assert here.source.startswith("the index of")


def test_what_will_not_fit_is_told_with_what_to_change():
    config = small()
    told = " ".join(planned(config, "H100", 8).problems)
    assert "8 workers are more than optimisation.lanes 4" in told
    assert "workers.maximum is 1: set it to 8" in told
    assert "4 lanes on 3 workers leave 33% of their time idle" in " ".join(
        planned(config, "H100", 3).problems
    )


def test_the_command_tells_all_and_needs_no_ray(tmp_path: Path):
    place = tmp_path / "job.yaml"
    place.write_text(SMALL)
    runner = CliRunner()
    result = runner.invoke(app, ["plan", str(place)], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 100
    assert "unknown on a CPU" in result.output
    result = runner.invoke(app, ["plan", str(place), "--gpu", "h100", "--gpus", "2", "--json"])
    values = json.loads(result.output)
    assert values["assumptions"]["gpu"]["name"] == "H100"
    assert len(values["settings"]) == 12
    memory = values["job"]["memory"]
    assert memory["total"] == sum(size for part, size in memory.items() if part != "total")
    assert values["hours"] * 2 * values["spot"]["per_hour"] == pytest.approx(
        values["spot"]["total"]
    )
    result = runner.invoke(app, ["plan", str(place), "--gpu", "abacus"])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
