"""`Launcher`, the description of a training program, and the two launchers, `LLM` and `IMAGES`.

`train_llm.py` and `train_imagenet.py` start them. The experiments, `stacey-dist prepare`, and messages that name the
other program use them too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from stacey_dist.training.processes.failures import user_errors
from stacey_dist.training.settings.command_line import parse
from stacey_dist.training.settings.config import RunConfig
from stacey_dist.training.settings.image_config import ImageConfig
from stacey_dist.training.settings.llm_config import LLMConfig

if TYPE_CHECKING:  # they take seconds to import, and bad settings are refused before
    from torch import nn

    from stacey_dist.training.callbacks import Callback
    from stacey_dist.training.engine import Engine
    from stacey_dist.training.run import Run
    from stacey_dist.training.task import Task

C = TypeVar("C", bound=RunConfig)


@dataclass(frozen=True)
class Parts:
    """The parts that a run of a launcher is built of.

    Args:
        prepare_data: Find or prepare the run's data. Called by all processes together, as are the others; returns
            whatever the other parts need of the data.
        build_model: Build the model from the run and its data, on the CPU, with the same initial weights on every
            process; or call `stacey_dist.training.initial_weights.make_model`, which gives each process only its shard.
        task: Make the task from the run, its data and its model; a subclass of `Task`.
        finish: Export the model of the last checkpoint, from the run, its data, its engine and the checkpoint's
            path; returns a line that says where it is. None: the checkpoints are all that is left.
        callbacks: Return the callbacks of the run, from the run and its data.
    """

    prepare_data: "Callable[[Run[Any]], Any]"
    build_model: "Callable[[Run[Any], Any], nn.Module]"
    task: "Callable[[Run[Any], Any, Any], Task]"
    finish: "Callable[[Run[Any], Any, Engine, Path], str] | None" = None
    callbacks: "Callable[[Run[Any], Any], Sequence[Callback]]" = lambda run, data: ()


@dataclass(frozen=True)
class BuiltRun:
    """A run that is ready to train, as seen by one of its processes.

    Attributes:
        run: The run: its settings, its directory, its processes.
        data: What `Parts.prepare_data` returned.
        task: What it trains on.
        engine: The model and its optimizer. `engine.module` is the model as it was built.
        parts: What it was built of.
        callbacks: Its callbacks.
    """

    run: "Run[Any]"
    data: Any
    task: "Task"
    engine: "Engine"
    parts: Parts
    callbacks: "Sequence[Callback]" = ()

    def train(self, until: int | None = None) -> Path:
        """Train from the run's newest checkpoint; returns the new one. See `stacey_dist.training.train`.

        Args:
            until: The update to stop after. None: the last one.
        """
        from stacey_dist.training.loop import train

        return train(self.run, self.task, self.engine, callbacks=self.callbacks, until=until)

    def finish(self, checkpoint: Path) -> None:
        """Export the model of a checkpoint, if the parts say how, and end what the run has started."""
        self.task.close()
        if self.parts.finish:
            self.run.report(self.parts.finish(self.run, self.data, self.engine, checkpoint))
        self.engine.close()


@dataclass(frozen=True)
class Launcher(Generic[C]):
    """A training program: its settings, and what a run is built of.

    A program of your own is a `Launcher` with a subclass of `RunConfig`, started by `accelerate launch`::

        Launcher("my_program.py", MyConfig, lambda: Parts(prepare_data, build_model, MyTask)).main()

    Args:
        program: The file that starts it, for messages.
        config: The dataclass of its settings. Every field is an option of the command line and a key in YAML files; its
            type is `bool`, `int`, `float`, `str`, `Literal`, a list, a tuple of fixed length, one of these or None, or
            a dataclass. `check_rules` says which values do not go together.
        load_parts: Return what a run is built of. It is called after the settings were checked, so that imports which
            take seconds can wait until then.
        metrics: The names of the figures that an evaluation gives.
        users_data: A function from a user's data, files separated by commas, to the settings that train on them.
        callbacks: Further callbacks of each run.
    """

    program: str
    config: type[C]
    load_parts: Callable[[], Parts]
    metrics: Sequence[str] = ("eval_loss",)
    users_data: Callable[[str], dict[str, Any]] | None = None
    callbacks: "Sequence[Callback]" = ()

    def parse(self, arguments: Sequence[str] | None = None, program: str | None = None) -> C:
        """Return the settings of `arguments`, by default those of the command line, checked.

        Prints the help and exits for --help; prints the error and exits with status 2 for what cannot be parsed.

        Args:
            arguments: Options, as in `["--config", "a.yaml", "--optimizer.p", "3"]`.
            program: The name in messages, by default the name that the program was started by.

        Raises:
            SettingsError: A value is out of range, or values do not go together.
        """
        elsewhere = {name: other.config for name, other in LAUNCHERS.items() if name != self.program}
        config = parse(self.config, arguments, program, elsewhere)
        config.validate()
        return config

    def build(self, config: C) -> BuiltRun:
        """Join the processes and build the run: data, model, optimizer, task and engine.

        All processes call it together.

        Raises:
            SettingsError: The data, the model or the engine cannot be created as configured.
        """
        from accelerate.utils import set_seed

        from stacey_dist.training.activation_checkpointing import checkpoint_activations
        from stacey_dist.training.engine import build_engine
        from stacey_dist.training.optimizers import build_optimizer, check_engine
        from stacey_dist.training.processes.launch import ZERO_REDUNDANCY, requested_engine
        from stacey_dist.training.start import start

        config.validate()  # a program may have changed values since they were parsed
        check_engine(config.optimizer.name, requested_engine())
        parts = self.load_parts()
        config.require(
            parts.finish is not None or config.hub.push_to is None, "hub.push_to", "this program exports no model"
        )
        run = start(config)
        data = parts.prepare_data(run)
        set_seed(config.seed)  # the main process may have drawn random numbers for the data
        model = parts.build_model(run, data)
        checkpoint_activations(model, config.train.gradient_checkpointing)
        if config.train.compile:
            model.compile()
        by_owner = requested_engine() == ZERO_REDUNDANCY
        optimizer = build_optimizer(model, config.optimizer, config.seed, by_owner=by_owner)
        task = parts.task(run, data, model)
        engine = build_engine(run, model, optimizer)
        return BuiltRun(run, data, task, engine, parts, [*parts.callbacks(run, data), *self.callbacks])

    def run(self, config: C) -> Path:
        """Train to the last update and export the model; returns the last checkpoint. Raises as `build` and `train`."""
        built = self.build(config)
        checkpoint = built.train()
        built.finish(checkpoint)
        return checkpoint

    def main(self) -> None:
        """Train as the command line says.

        An error that a user can fix is one line on standard error; the exit status is then 2 for bad settings or
        data, else 1.
        """
        with user_errors(self.program):
            self.run(self.parse())


def _llm_parts() -> Parts:
    from stacey_dist.training.tasks.llm import PARTS

    return PARTS


def _image_parts() -> Parts:
    from stacey_dist.training.tasks.images import PARTS

    return PARTS


LLM = Launcher(
    "train_llm.py",
    LLMConfig,
    _llm_parts,
    metrics=("eval_loss", "eval_perplexity"),
    users_data=lambda data: {"data.dataset": None, "data.files": data.split(",")},
)
IMAGES = Launcher(
    "train_imagenet.py",
    ImageConfig,
    _image_parts,
    metrics=("eval_loss", "eval_top1", "eval_top5"),
    users_data=lambda data: {"data.dataset": None, "data.path": data},
)
LAUNCHERS: dict[str, Launcher[Any]] = {launcher.program: launcher for launcher in (LLM, IMAGES)}
