"""The callbacks that a run's settings request: plots, norms, a profile."""

from stacey_dist.training.callbacks import Callback
from stacey_dist.training.reports.loss_plot import Plot, draw_losses
from stacey_dist.training.reports.norms import Norms, draw_norms
from stacey_dist.training.reports.profiler import Profiler
from stacey_dist.training.settings.config import RunConfig


def callbacks_of(config: RunConfig) -> list[Callback]:
    """Return the callbacks for a run of these settings."""
    found: list[Callback] = [Plot("loss.png", draw_losses)]
    if config.tracking.histogram_every is not None:
        norms = Plot("norms.png", lambda training: draw_norms(training.run.directory / "norms.jsonl"))
        found += [Norms(config.tracking.histogram_every), norms]
    if config.train.profile is not None:
        found.append(Profiler(*config.train.profile))
    return found
