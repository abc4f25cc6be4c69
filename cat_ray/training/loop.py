"""The training loop: next batch, both steps, average, record, save, ask whether to go on.

A step's figures are judged one step late, so that no step waits for them: only a save does.
"""

from cat_ray.training.session import Session, due
from cat_ray.training.steps import training_step


def train(session: Session) -> None:
    """Trains from the session's place in the stream to the end of the run.

    Raises:
        GaveWay: the worker group ends before it.
    """
    config, batch_size = session.config, session.config.optimisation.batch_size

    for batch in session.batches():
        micro_batches = session.micro_batches(batch)
        figures, fakes = training_step(session.adversaries, session.averages, micro_batches)
        session.images += batch_size

        session.send(figures)
        session.recorder.add(figures, fakes)
        if due(session.images, config.reporting.log_every_images, config):
            session.record()
        if due(session.images, config.reporting.grid_every_images, config):
            session.draw_grid()
        if due(session.images, config.evaluation.every_images, config):
            session.evaluate()
        if session.save_is_due():
            session.save()
        session.end_step()
    session.finish()
