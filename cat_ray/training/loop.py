"""The training loop: next batch, both steps, average, record, save, ask whether to go on."""

import torch

from cat_ray.evaluation.alignment_metrics import alignment_figures
from cat_ray.training.session import Session, due
from cat_ray.training.steps import discriminator_step, generator_step


def train(session: Session) -> None:
    """Trains from the session's place in the stream to the end of the run.

    Raises:
        GaveWay: the worker group ends before it.
    """
    config, adversaries = session.config, session.adversaries
    batch_size = config.optimisation.batch_size
    reuse = config.optimisation.reuse_generator_forward

    for batch in session.batches():
        labels = torch.from_numpy(batch.labels).to(session.device)
        draws = session.draw_step(batch)
        reals = session.reals(batch, draws.posterior)

        with torch.set_grad_enabled(reuse):
            outputs = adversaries.generator(draws.latents, labels)
        figures = discriminator_step(adversaries, reals, labels, outputs.detach(), draws)
        if not reuse:
            outputs = adversaries.generator(draws.latents, labels)
        figures |= generator_step(adversaries, reals.images, labels, outputs, draws)
        session.averages.update()
        session.images += batch_size

        for name, values in alignment_figures(outputs.detach()).items():
            figures[name] = values.sum() / batch_size
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
