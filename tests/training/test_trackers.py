"""Trackers show the updates of the run as it went on, not those that a killed run has left."""

from types import SimpleNamespace

from stacey_dist.training.reports.trackers import log, start_trackers
from stacey_dist.training.settings.config import RunConfig


def test_tensorboard_hides_the_updates_after_the_checkpoint(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    config, told = RunConfig(), {}
    config.tracking.trackers = ["tensorboard"]
    accelerator = SimpleNamespace(
        trackers=[], init_trackers=lambda project, config, init_kwargs: told.update(init_kwargs)
    )
    run = SimpleNamespace(config=config, accelerator=accelerator, directory=tmp_path, tracker_ids={})
    for begun, steps in ((0, (1, 2, 3, 4)), (2, (3, 4, 5))):
        start_trackers(run, begun)
        with SummaryWriter(str(tmp_path), **told["tensorboard"]) as writer:
            for step in steps:
                writer.add_scalar("loss", 10.0 * begun + step, global_step=step)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1), (2, 2), (3, 23), (4, 24), (5, 25)]


def test_wandb_gets_the_update_as_a_column():
    """Its own steps only grow: it would drop the rows of updates that are made again."""

    class Tracker:
        def __init__(self, name):
            self.name, self.logged = name, []

        def log(self, row, step=None):
            self.logged.append((row, step))

    trackers = [Tracker("wandb"), Tracker("tensorboard")]
    log(SimpleNamespace(accelerator=SimpleNamespace(trackers=trackers)), {"step": 3, "loss": 1.0})
    assert [tracker.logged for tracker in trackers] == [[({"step": 3, "loss": 1.0}, None)], [({"loss": 1.0}, 3)]]
