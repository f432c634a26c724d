"""Record each layer's norms of weights, gradients and states at intervals, in norms.jsonl and norms.png."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stacey_dist.optim.memory import local
from stacey_dist.sharding import Fragment, base_optimizer, fragments
from stacey_dist.sharding.fragment import trainable_parameters
from stacey_dist.training.callbacks import Callback, Training
from stacey_dist.training.engine import Engine
from stacey_dist.training.reports.rows import RowFile, read_rows
from stacey_dist.training.reports.trackers import log

KINDS = {
    "weight_norm": "weights",
    "gradient_norm": "gradient, clipped",
    "update_norm": "change of the weights",
    "momentum_norm": "m",
    "z_distance": "z - weights",
}
"""The columns of norms.jsonl, and what they are the norm of."""
_MOMENTA = ("m", "exp_avg", "momentum_buffer")


def layer_of(name: str) -> str:
    """Return the layer of a parameter: its name to the first number in it, or without its last part."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[: number + 1] if number is not None else parts[:-1]) or name


class Norms(Callback):
    """Writes the Euclidean norms of each layer's tensors every `every` updates: of weights, gradients and states.

    The gradients are those that the optimizer takes: summed, and clipped. On an update that is looked at, each process
    has a copy of its share of the weights, and the host waits for the device; on others nothing is done.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._watch: _Watch | None = None

    def on_run_begin(self, training: Training) -> None:
        """Drop the rows of updates that are made again."""
        self.rows = RowFile(training.run.directory / "norms.jsonl", training.run.say)
        if training.run.accelerator.is_main_process:
            self.rows.drop_later(training.step, training.step)
        names = (name for name, _ in trainable_parameters(training.engine.module))
        self.layers = list(dict.fromkeys(map(layer_of, names)))

    def on_update_begin(self, training: Training) -> None:
        """Begin to watch the optimizer, where the update is to be looked at."""
        if (training.step + 1) % self.every == 0:
            self._watch = _Watch(training.engine)

    def on_update_end(self, training: Training) -> None:
        """Sum the squares over each layer and over the processes, and write their roots."""
        if self._watch is None:
            return
        measured, self._watch = list(self._watch.norms()), None
        accelerator = training.run.accelerator
        columns = {(kind, layer): i for i, (kind, layer) in enumerate((k, x) for k in KINDS for x in self.layers)}
        # The second row counts, for an optimizer has not each of the kinds.
        sums = torch.zeros(2, len(columns), dtype=torch.float64, device=accelerator.device)
        if measured:
            places = torch.tensor([columns[kind, layer] for kind, layer, _ in measured], device=sums.device)
            squares = torch.stack([norm.to(sums) for _, _, norm in measured]).square()
            sums.index_add_(1, places, torch.stack([squares, torch.ones_like(squares)]))
        if accelerator.num_processes > 1:
            torch.distributed.all_reduce(sums)
        norms, counts = sums[0].sqrt().tolist(), sums[1].tolist()
        found = {f"{kind}/{layer}": norms[i] for (kind, layer), i in columns.items() if counts[i]}
        row = {"step": training.step, **found}
        if accelerator.is_main_process:
            self.rows.append(row)
        log(training.run, row)

    def on_run_end(self, training: Training) -> None:
        """Write the rows that wait."""
        self.rows.flush()


class _Watch:
    """Sees the gradients of one update, and the weights before it, as the engine's own optimizer does.

    Engines that shard hold no gradient where the loop could read it: they give it to their optimizer, one group of
    parameters after the other, and take it away.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._parts = self._own()
        self._gradients: dict[Any, Tensor] = {}
        self._before: dict[Any, Tensor] = {}
        self._hook = base_optimizer(engine.optimizer).register_step_pre_hook(self._look)

    def norms(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield (kind, layer, norm) of each part on this process, after the update."""
        self._hook.remove()
        for part in self._own():
            layer, weight = layer_of(part.name), part.weight.float()
            yield "weight_norm", layer, _norm(weight)
            if _key(part) in self._before:  # an optimizer is not asked to make an update that is skipped
                yield "gradient_norm", layer, self._gradients[_key(part)]
                yield "update_norm", layer, _norm(weight - self._before[_key(part)].float())
            for momentum in (part.state[name] for name in _MOMENTA if name in part.state):
                yield "momentum_norm", layer, _norm(momentum)
            if part.z is not None:
                yield "z_distance", layer, _norm(part.z.float() - weight)

    def _own(self) -> list[Fragment]:
        """Return this process's parts; of those that several hold, the first one's."""
        found = fragments(self._engine.model, self._engine.optimizer)
        return [part for part in found if part.replica == 0]

    def _look(self, optimizer: Any, *_: Any) -> None:
        for part in self._parts:
            if part.owner.grad is not None and _key(part) not in self._before:
                norm = _norm(_same_part(part, part.owner.grad))
                divisor = getattr(optimizer, "grad_scale", None)  # with which Stacey clips
                self._gradients[_key(part)] = norm if divisor is None else norm / divisor.to(norm)
                self._before[_key(part)] = part.weight.clone()


def _key(part: Fragment) -> tuple[str, int]:
    return part.name, part.start


def _same_part(part: Fragment, gradient: Tensor) -> Tensor:
    """Return the slice of `part.owner`'s gradient that corresponds to `part`."""
    mine = local(gradient)
    if mine.numel() == part.weight.numel():
        return mine
    offset = int(part.weight.storage_offset() - part.owner.storage_offset())
    return mine.narrow(0, offset, part.weight.numel())


def _norm(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, dtype=torch.float32)


def draw_norms(path: Path) -> None:
    """Draw norms.png from the norms.jsonl at `path`: a panel for each kind, a line for each layer."""
    from matplotlib.figure import Figure  # the main process alone draws

    rows = read_rows(path)
    kinds = [kind for kind in KINDS if any(name.startswith(f"{kind}/") for row in rows for name in row)]
    if not kinds:
        return
    layers = layers_in(rows)
    figure = Figure(figsize=(8, 2.2 * len(kinds) + 0.4), layout="constrained")
    panels = figure.subplots(len(kinds), sharex=True, squeeze=False)[:, 0]
    for kind, axes in zip(kinds, panels, strict=True):
        names = {layer: f"{kind}/{layer}" for layer in layers}
        draw_layers(axes, {x: [(row["step"], row[n]) for row in rows if row.get(n)] for x, n in names.items()})
        axes.set(yscale="log", title=f"norm of {KINDS[kind]}, by layer")
        axes.title.set_size("small")
    panels[-1].set(xlabel="update")
    handles, names = panels[0].get_legend_handles_labels()
    chosen = sorted({round(i * (len(names) - 1) / 7) for i in range(8)})  # as many as there is room for
    shown = ([handles[i] for i in chosen], [names[i] for i in chosen])
    figure.legend(*shown, loc="outside upper center", ncols=4, fontsize="small")
    figure.savefig(path.with_name("norms.png"), dpi=120)


def layers_in(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Return the layers of columns that are named kind/layer."""
    return list(dict.fromkeys(name.partition("/")[2] for row in rows for name in row if "/" in name))


def draw_layers(axes: Any, points: dict[str, list[tuple[int, float]]]) -> None:
    """Draw a line for each layer through its points, (update, value)."""
    from matplotlib import colormaps

    for number, (layer, own) in enumerate(points.items()):
        if own:
            color, marker = colormaps["viridis"](number / max(1, len(points) - 1)), "o" if len(own) == 1 else None
            axes.plot(*zip(*own, strict=True), color=color, linewidth=1, marker=marker, label=layer)
    axes.grid(alpha=0.3)
