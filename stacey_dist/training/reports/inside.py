"""The callbacks that the settings of a run ask for."""

from stacey_dist.training.callbacks import Callback, Training
from stacey_dist.training.reports.loss_plot import Plot, draw_losses
from stacey_dist.training.reports.norms import Norms, draw_norms
from stacey_dist.training.reports.profiler import Profiler
from stacey_dist.training.settings.config import RunConfig


def callbacks_of(config: RunConfig) -> list[Callback]:
    """Return what draws, measures and profiles a run of these settings."""
    found: list[Callback] = [Plot("loss.png", _losses)]
    if config.tracking.histogram_every is not None:
        found += [Norms(config.tracking.histogram_every), Plot("norms.png", _norms)]
    if config.train.profile is not None:
        found.append(Profiler(*config.train.profile))
    return found


def _losses(training: Training) -> None:
    task, label = training.task, getattr(training.task, "loss_label", "loss")
    draw_losses(training.run.directory / "metrics.jsonl", label, task.unit, task.units(0))


def _norms(training: Training) -> None:
    draw_norms(training.run.directory / "norms.jsonl")
