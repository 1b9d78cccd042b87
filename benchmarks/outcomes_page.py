"""The tables and the picture of `docs/outcomes.md`."""

import numpy as np

from benchmarks import drawing
from benchmarks.machine import place, stamped
from benchmarks.outcomes import CONTENDERS, SIZES, SUMS
from jaxlinear.inspect._table import table

BASE, *OTHERS = CONTENDERS
TRAININGS = {
    **{
        f"events-{a * b}": f"events of 1 %: predicted / observed, {a} × {b} tokens"
        for a, b in SIZES
    },
    "events-one-axis": "events of 1 %: the same, 4,096 tokens in one axis",
    "events-three-axes": "events of 1 %: the same, 16 × 16 × 16 tokens",
    "events-common": "events of 30 %: the same, 64 × 64 tokens",
    "counts": "counts of mean 5: predicted / observed, 64 × 64 tokens",
    "offset": "target of mean 10, gradient descent: squared error",
    "characters": "character model, 32 × 256 tokens: held-out loss",
    "embedding": "the same, beside an embedding cast to bfloat16",
    "long": "the same model, 2,000 steps at a rate of 1e-5: held-out loss",
    "accumulated": "the same, gradients of 64 microbatches: held-out loss",
    "finetuned": "the same, fine-tuned by SGD at 1e-3: held-out loss",
}
SEARCHES = {
    "lbfgs": "L-BFGS, zoom line search",
    "conjugate-gradients": "nonlinear conjugate gradients, the same line search",
}
DRAWN = ["Flax NNX", "Flax NNX, ∇B as on an H100", "jaxlinear"]


def of(document, experiment, contender):
    """The outcomes of the seeds."""
    return np.array(
        [
            row["outcome"]
            for row in document["rows"]
            if (row["experiment"], row["contender"]) == (experiment, contender)
        ]
    )


def percents(document, experiment, contender):
    """By how much each seed's outcome differs from that seed's in float32."""
    base, found = (of(document, experiment, name) for name in (BASE, contender))
    return 100 * (found / base - 1) if len(found) else found


def tables(document):
    """The generated parts of the page, by name."""
    return {
        "outcomes": f"{caption(document)}\n\n{trainings(document)}",
        "outcomes-searches": searches(document),
        "outcomes-sums": sums(document),
    }


def caption(document):
    versions = document["versions"]
    names = {"jax": "JAX", "flax": "Flax", "optax": "Optax"}
    found = ", ".join(f"{names[name]} {versions[name]}" for name in names)
    return f"Run {stamped(document)} on a {place(document)}, with {found}:"


def spread(values, form):
    """The mean, and the least and the largest, which are equal for one value."""
    if not len(values):
        return ""
    low, high = form.format(values.min()), form.format(values.max())
    return f"{form.format(values.mean())} ({low} to {high})"


def trainings(document):
    heading = ["outcome", "seeds", "float32", *(f"{name}, %" for name in OTHERS)]
    lines = []
    for name, what in TRAININGS.items():
        base = of(document, name, BASE)
        cells = (spread(percents(document, name, other), "{:+.2f}") for other in OTHERS)
        lines.append([what, len(base), f"{base.mean():.4f}", *cells])
    return table(heading, lines)


def searches(document):
    lines = [
        [what, *(spread(of(document, name, c), "{:.0e}") for c in CONTENDERS)]
        for name, what in SEARCHES.items()
    ]
    return table(["loss above the minimum", *CONTENDERS], lines)


def sums(document):
    lines = []
    for shape in SUMS:
        name = f"sum-{'-'.join(map(str, shape))}"
        found = (of(document, name, contender).item() for contender in CONTENDERS)
        lines.append(
            [" × ".join(map(str, shape)), *(f"{ratio:.4g}" for ratio in found)]
        )
    return table(["axes of the tokens", *CONTENDERS], lines)


def draw(document, folder):
    drawing.save(folder / "outcomes-events.png", events, document)


def events(document):
    """Rare events against the tokens of a batch."""
    figure, [ax] = drawing.stacked(1, 3.5)
    tokens = [a * b for a, b in SIZES]
    for contender, style in zip(DRAWN, ["C1-o", "C2--s", "C0-^"], strict=True):
        found = [percents(document, f"events-{n}", contender) for n in tokens]
        color = style[:2]
        ax.plot(tokens, [f.mean() for f in found], style, label=contender, markersize=5)
        low, high = [f.min() for f in found], [f.max() for f in found]
        ax.fill_between(tokens, low, high, color=color, alpha=0.2, linewidth=0)
    ax.set(xscale="log", xlabel="tokens of a batch, in two axes")
    ax.set_ylabel("predicted rare events,\n% above float32's")
    ax.set_xticks(tokens, [f"{n:,}" for n in tokens])
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    drawing.legend(figure, ax, columns=1)
    return figure
