"""The style of plots: colours for light and dark pages, text for a telephone.

What is drawn must be seen on white and on the dark pages, so nothing is black or
white, and the background is transparent. A telephone is nearly as wide as ``WIDTH``.
"""

import matplotlib.style
from cycler import cycler
from matplotlib.figure import Figure

WIDTH = 5  # inches, as wide as 360 points
BACKGROUNDS = "#ffffff", "#1e2129"  # of the pages, light and dark
GREY = "#808080"
COLOURS = (
    *("#3183c8", "#d1720c", "#2f9a44", "#dd4b4b"),
    *("#9b6bd6", "#a8724f", "#d159a8", GREY),
)
STYLE = {
    "axes.edgecolor": GREY,
    "axes.facecolor": "none",
    "axes.labelcolor": GREY,
    "axes.prop_cycle": cycler(color=COLOURS),
    "figure.constrained_layout.use": True,
    "legend.framealpha": 0,
    "savefig.dpi": 200,
    "savefig.transparent": True,
    "text.color": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
}


def save(path, plot, *arguments):
    """Write what ``plot`` draws, in this style."""
    with matplotlib.style.context(STYLE):
        plot(*arguments).savefig(path)


def stacked(panels, height, **options):
    """A figure and its axes, one below the other, each of a height in inches."""
    figure = Figure((WIDTH, panels * height + 0.7))
    return figure, figure.subplots(panels, 1, squeeze=False, **options)[:, 0]


def legend(figure, axes, columns=2):
    """The legend of all panels, above the first."""
    labels = axes.get_legend_handles_labels()
    figure.legend(*labels, loc="outside upper center", ncols=columns, fontsize=9)
