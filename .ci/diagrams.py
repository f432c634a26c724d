"""The diagrams of the documentation, as SVG: `python .ci/diagrams.py` writes docs/assets/*.svg."""

from html import escape
from pathlib import Path

ASSETS = Path(__file__).parents[1] / "docs" / "assets"
INK, QUIET, EMPTY = "#1f2933", "#5f6b7a", "#eef1f5"
WEIGHT, STATE = "#3b6fb6", "#d9822b"


def drawing(width: int, height: int, title: str, parts: list[str]) -> str:
    """Return an SVG file of these parts, on white, so that it can be read on any background."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-family="system-ui, sans-serif" font-size="14">\n<title>{escape(title)}</title>\n'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        f'<path d="M0 0 8 4 0 8z" fill="{QUIET}"/></marker></defs>\n'
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def text(x: float, y: float, words: str, color: str = INK, anchor: str = "start", size: int = 14, bold: int = 0) -> str:
    """Return a line of text."""
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x}" y="{y}" fill="{color}" text-anchor="{anchor}" font-size="{size}"{weight}>{escape(words)}</text>'
    )


def box(x: float, y: float, width: float, height: float, fill: str = EMPTY) -> str:
    """Return a box without an outline."""
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="3" fill="{fill}"/>'


def arrow(path: str) -> str:
    """Return a line along an SVG path, with a tip at its end."""
    return f'<path d="{path}" fill="none" stroke="{QUIET}" stroke-width="1.5" marker-end="url(#tip)"/>'


def labelled(x: float, y: float, width: float, head: str, lines: list[str]) -> list[str]:
    """Return a box with a heading and lines below it."""
    parts = [box(x, y, width, 34 + 20 * len(lines)), text(x + 12, y + 24, head, bold=1)]
    return parts + [text(x + 12, y + 46 + 20 * i, line, QUIET, size=12) for i, line in enumerate(lines)]


def sharding() -> str:
    """Return how a parameter of 6 rows and 4 columns lies on 4 ranks, on each kind of engine."""
    whole = [(0, 24)] * 4
    slices = [(0, 5), (5, 13), (13, 21), (21, 24)]  # of a flat group, in which other parameters precede it
    rows = [(0, 8), (8, 16), (16, 24), (24, 24)]  # two rows each, and none are left for the last rank
    halves = [(0, 12), (12, 24)] * 2
    engines = [
        ("DDP", "a copy on each rank", whole, whole),
        ("DeepSpeed ZeRO-2", "a slice of the flat group", whole, slices),
        ("FSDP2", "rows; a rank may have none", rows, rows),
        ("HSDP", "rows, within each group of 2", halves, halves),
    ]
    parts = [text(24, 34, "One parameter of 24 elements on 4 ranks", bold=1, size=16)]
    parts += [box(420, 22, 14, 14, WEIGHT), text(440, 34, "weight")]
    parts += [box(520, 22, 14, 14, STATE), text(540, 34, "z and m, with ZeRO-2 the float32 weight too")]
    parts += [text(250 + 155 * rank, 66, f"rank {rank}", QUIET) for rank in range(4)]
    for line, (name, how, weights, states) in enumerate(engines):
        y = 80 + 64 * line
        parts += [text(24, y + 17, name, bold=1), text(24, y + 37, how, QUIET, size=12)]
        for rank in range(4):
            x = 250 + 155 * rank
            for row, (color, (start, stop)) in enumerate([(WEIGHT, weights[rank]), (STATE, states[rank])]):
                parts.append(box(x, y + 22 * row, 140, 16))
                if stop > start:
                    parts.append(box(x + start * 140 / 24, y + 22 * row, (stop - start) * 140 / 24, 16, color))
    parts.append(
        text(
            24,
            348,
            "An element's update needs that element alone. Given equal gradients, every cut gives the same bits.",
            INK,
        )
    )
    return drawing(890, 366, "How one parameter lies on four ranks under DDP, ZeRO-2, FSDP2 and HSDP", parts)


def run() -> str:
    """Return how a run flows."""
    steps = [
        ("data", ["sample k is a", "function of", "(seed, k)"]),
        ("loop", ["accumulate,", "clip, schedule,", "log, evaluate"]),
        ("engine", ["DDP, ZeRO,", "FSDP2, HSDP:", "gradients"]),
        ("optimizer", ["weight, z, m:", "element by", "element"]),
        ("fragments", ["the ranges", "that live on", "this rank"]),
        ("checkpoint", ["each rank writes", "its own; one", "rename"]),
    ]
    parts = []
    for i, (head, lines) in enumerate(steps):
        x = 20 + 148 * i
        parts += labelled(x, 24, 124, head, lines)
        if i:
            parts.append(arrow(f"M{x - 24} 71H{x - 3}"))
    parts.append(arrow("M822 120V158H230V122"))
    parts.append(text(526, 180, "resume: on any engine and any number of ranks", QUIET, "middle", 13))
    return drawing(904, 196, "How a run flows: data, loop, engine, optimizer, fragments, checkpoint, and back", parts)


def layout() -> str:
    """Return the packages in the order of their imports, and where a new part belongs."""
    packages = [
        ("optim/", "the update rule and its kernels", "a kernel: optim/kernels/"),
        ("sharding/", "which elements live on this rank", "an engine: sharding/ and training/engine.py"),
        ("checkpoint/", "fragments to files and back", ""),
        ("data/, models/", "text, images, networks", ""),
        ("training/", "settings, loop, engines of the launchers", "a setting: training/settings/config.py"),
        ("plan/, cli.py", "the commands of stacey-dist", ""),
        ("experiments/", "the paper's figures; not installed", "an experiment: experiments/registry.py"),
    ]
    parts = []
    for i, (name, what, new) in enumerate(packages):
        y = 20 + 58 * i
        parts += [box(20, y, 400, 40), text(34, y + 26, name, bold=1), text(160, y + 26, what, QUIET, size=13)]
        if i:
            parts.append(arrow(f"M60 {y - 1}V{y - 16}"))
        if new:
            parts += [box(450, y, 350, 40, "#fdf1e2"), text(464, y + 26, new, size=13)]
    parts.append(text(20, 444, "An arrow points at what is imported. The first three are the library.", QUIET, size=13))
    return drawing(820, 462, "The packages in the order of their imports, and where a new part belongs", parts)


DIAGRAMS = {"sharding.svg": sharding, "run.svg": run, "layout.svg": layout}

if __name__ == "__main__":
    for name, draw in DIAGRAMS.items():
        (ASSETS / name).write_text(draw(), encoding="utf-8")
