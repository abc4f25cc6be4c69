"""The training loop: next batch, both steps, average, record, save, ask whether to go on."""

import torch
from torch import distributed

from cat_ray.evaluation.alignment_metrics import alignment_figures
from cat_ray.training.session import Session, due
from cat_ray.training.steps import add_up, discriminator_step, generator_step


def train(session: Session) -> None:
    """Trains from the session's place in the stream to the end of the run.

    Raises:
        GaveWay: the worker group ends before it.
    """
    config, adversaries = session.config, session.adversaries
    generator = adversaries.generator
    batch_size = config.optimisation.batch_size
    # The fakes' graph is kept through the discriminator's step only where all are made at once.
    reuse = config.optimisation.reuses_forward(distributed.get_world_size())

    for batch in session.batches():
        micro_batches = session.micro_batches(batch)
        with torch.set_grad_enabled(reuse):
            fakes = [generator(each.draws.latents, each.labels) for each in micro_batches]

        figures = add_up(
            discriminator_step(adversaries, each, outputs.detach())
            for each, outputs in zip(micro_batches, fakes, strict=True)
        )
        figures |= add_up(
            generator_step(
                adversaries,
                each,
                outputs if reuse else generator(each.draws.latents, each.labels),
            )
            for each, outputs in zip(micro_batches, fakes, strict=True)
        )
        session.averages.update()
        session.images += batch_size

        figures |= add_up(
            {name: values.sum() / batch_size for name, values in alignment_figures(outputs).items()}
            for outputs in (each.detach() for each in fakes)
        )
        session.recorder.add(figures)
        if due(session.images, config.reporting.log_every_images, config):
            session.record()
        if due(session.images, config.reporting.grid_every_images, config):
            session.draw_grid()
        if due(session.images, config.evaluation.every_images, config):
            session.evaluate()
        if due(session.images, config.checkpoints.save_every_images, config):
            session.save()
        session.end_step(figures)
    session.finish()
