"""Figures of a run as PNG files, from plain numbers; matplotlib (extra `plot`) is loaded when a figure is drawn."""

import math
from pathlib import Path

INK, MUTED, ACCENT, SECOND = "#222222", "#8a8a8a", "#1f5fa8", "#d1603d"


def require_matplotlib():
    """ValueError in one sentence when the extra is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("figures need matplotlib, install it with: pip install 'exlstm[plot]'") from None


def check_picture(path: Path):
    """ValueError in one sentence where a figure cannot be written to a file of this name."""
    require_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.lower().lstrip(".") not in known:
        raise ValueError(f"{path} names no kind of picture by its ending, wanted one of {', '.join(known)}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, wanted a file for the picture")


def _canvas(rows=1, columns=1, size=(8.0, 4.5)):
    require_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The object interface only: no window, no global state, whatever backend the user's settings name.
    with matplotlib.rc_context({"font.size": 10}):
        figure = Figure(figsize=size, dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_loss(path: Path, train: dict[int, float], held_out: dict[int, float], xz: float, title: str = ""):
    """Loss over steps in bits per byte: every training step, its running mean, the held-out points, and xz's rate."""
    figure, ((axis,),) = _canvas()
    means = _running_mean(list(train.values()))
    axis.plot(list(train), list(train.values()), color=MUTED, linewidth=0.6, alpha=0.5)
    axis.plot(list(train), means, color=ACCENT, linewidth=1.6, label="training, running mean")
    if held_out:
        axis.plot(
            list(held_out), list(held_out.values()), "o-", color=SECOND, markersize=4, linewidth=1, label="held out"
        )
        last = list(held_out.items())[-1]
        axis.annotate(f"{last[1]:.2f}", last, textcoords="offset points", xytext=(0, 7), ha="center", color=SECOND)
    axis.axhline(xz, color=INK, linewidth=1, linestyle="--", label=f"xz on held-out text, {xz:.2f}")
    # Every model begins near the 8 bits of a byte; the scale is for what follows.
    shown = [value for value in (*held_out.values(), *means[len(means) // 20 :], xz) if math.isfinite(value)]
    axis.set_ylim(max(0.0, min(shown) - 0.3), max(shown) + 0.3)
    axis.set(xlabel="step", ylabel="loss in bits per byte", title=title)
    axis.title.set_size(10)
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axis.legend(frameon=False)
    figure.savefig(path)


def _running_mean(values):
    """Exponential mean over about a fiftieth of the run, without the bias of its start."""
    keep, total, weight, means = 0.5 ** (1 / max(2, len(values) / 100)), 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight if weight else math.nan)
    return means


# What is drawn of a head: its name, the field of models/probe.py's Head, colours, and the number as text.
MAPS = (
    ("forget horizon, tokens until 1/e", "horizon", "YlGnBu", lambda value: _short(value)),
    ("mean forget gate", "forget", "YlGnBu", lambda value: f"{value:.3f}"),
    ("mean input gate, nats", "log_i", "PuOr_r", lambda value: f"{value:+.1f}"),
)


def draw_gates(path: Path, heads: list, title: str = ""):
    """Horizon, forget and input gate as heat maps, a row a layer, a column a head; `heads` as of models/probe.py."""
    blocks = {head.layer: head.block for head in heads}
    layers, columns = sorted(blocks), 1 + max(head.head for head in heads)
    size = (max(7.5, 1.2 + 3 * (0.75 * columns + 0.9)), 1.7 + 0.5 * len(layers))
    figure, (axes,) = _canvas(1, len(MAPS), size)
    for axis, (name, field, colours, text) in zip(axes, MAPS, strict=True):
        grid = [[math.nan] * columns for _ in layers]
        for head in heads:
            grid[layers.index(head.layer)][head.head] = getattr(head, field)
        _heat_map(axis, grid, _tints(grid, field), colours, text)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("head")
        axis.set_xticks(range(columns))
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
    axes[0].set_yticks(range(len(layers)), [f"{layer}  {blocks[layer]}" for layer in layers])
    axes[0].set_ylabel("layer")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)


def _tints(grid, field):
    """The grid as numbers from 0 to 1: horizons by their logarithm, input gates around their zero."""
    known = [value for row in grid for value in row if not math.isnan(value)]
    longest = max((value for value in known if value < math.inf), default=1.0)

    def place(value):
        # A head that never forgets has the colour of the longest horizon.
        return math.log(max(min(value, longest), 0.1)) if field == "horizon" else value

    low, high = place(min(known)), place(max(known))
    if field == "log_i":
        high = max(abs(low), abs(high))
        low = -high
    return [[(place(value) - low) / ((high - low) or 1.0) for value in row] for row in grid]


def _heat_map(axis, grid, tints, colours, text):
    shown = axis.imshow(tints, cmap=colours, vmin=-0.1, vmax=1.1, aspect="auto")
    for i, row in enumerate(grid):
        for j, value in enumerate(row):
            if not math.isnan(value):
                red, green, blue, _ = shown.to_rgba(tints[i][j])
                dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
                axis.text(j, i, text(value), ha="center", va="center", fontsize=8, color="white" if dark else INK)


def _short(value):
    """A horizon in at most four characters."""
    if value == math.inf:
        return "∞"
    if value >= 1e6:
        return f"{value / 1e6:.0f}M"
    if value >= 1000:
        return f"{value / 1000:.0f}k" if value >= 9950 else f"{value / 1000:.1f}k"
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def draw_forecasts(pieces: list, model: str, baselines: list, path: Path | None = None):
    """A panel a series: history, forecast with its intervals, and the baselines; the figure, or a PNG at `path`.

    `pieces` holds (name, past times, past values, future times, {column: values}) a series, the columns of intervals named
    <model>-lo-80 and <model>-hi-80.
    """
    columns = 1 if len(pieces) == 1 else 2
    rows = -(-len(pieces) // columns)
    figure, axes = _canvas(rows, columns, (8.0 if columns == 1 else 13.0, max(4.2, 2.9 * rows)))
    for axis, (name, past, values, ahead, lines) in zip(axes.flat, pieces):
        axis.plot(past, values, color=INK, linewidth=1.1, label="history")
        levels = sorted((c.rsplit("-", 1)[1] for c in lines if c.startswith(f"{model}-lo-")), key=float, reverse=True)
        for level, alpha in zip(levels, (0.15, 0.3, 0.4, 0.5, 0.6)):
            low, high = lines[f"{model}-lo-{level}"], lines[f"{model}-hi-{level}"]
            axis.fill_between(ahead, low, high, color=ACCENT, alpha=alpha, linewidth=0, label=f"{level} %")
        for style, baseline in zip((":", "--"), baselines):
            if baseline in lines:
                axis.plot(
                    ahead,
                    lines[baseline],
                    style,
                    color=SECOND if style == ":" else MUTED,
                    linewidth=1.2,
                    label=baseline,
                )
        axis.plot(ahead, lines[model], color=ACCENT, linewidth=1.8, label=model)
        axis.set_title(name, fontsize=10)
        axis.tick_params(axis="x", labelrotation=20)
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    for axis in list(axes.flat)[len(pieces) :]:
        axis.remove()
    axes.flat[0].legend(frameon=False, fontsize=8)
    if path is None:
        return figure
    figure.savefig(path)
    return None
