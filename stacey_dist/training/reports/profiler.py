"""Profile some updates with torch's profiler; on a GPU, their memory too."""

import torch
from torch.profiler import profile

from stacey_dist.training.callbacks import Callback, Training

_ENTRIES = 1_000_000  # allocations that are kept; a longer range keeps its last ones


class Profiler(Callback):
    """Profiles the updates from `first` to `last` on the main process, into run_dir/profile."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self._profile: profile | None = None

    def on_update_begin(self, training: Training) -> None:
        """Start profiling before the first update of the range."""
        run, due = training.run, self.first <= training.step + 1 <= self.last
        if not due or self._profile is not None or not run.accelerator.is_main_process:
            return
        self._begun = training.step + 1  # later than the first, where a run resumes among them
        if run.accelerator.device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=_ENTRIES)
        self._profile = profile(record_shapes=True, profile_memory=True, with_stack=True)
        self._profile.start()

    def on_update_end(self, training: Training) -> None:
        """Write the profile after the last update of the range."""
        if training.step == self.last:
            self.on_run_end(training)

    def on_run_end(self, training: Training) -> None:
        """Write the profile of the updates so far."""
        if self._profile is None:
            return
        profiled, self._profile = self._profile, None
        profiled.stop()
        run = training.run
        directory = run.directory / "profile"
        try:
            directory.mkdir(exist_ok=True)
            name = f"{self._begun}-{training.step}"
            profiled.export_chrome_trace(str(directory / f"updates-{name}.json.gz"))
            if run.accelerator.device.type == "cuda":
                torch.cuda.memory._dump_snapshot(str(directory / f"memory-{name}.pickle"))
            run.say(f"profile of updates {self._begun} to {training.step}: {directory}")
        except OSError as error:
            run.say(f"train.profile: {directory} could not be written, training continues: {error}")
        finally:
            if run.accelerator.device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)
