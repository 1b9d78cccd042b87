"""Train a classifier of handwritten digits in which every layer is jaxlinear's.

    python examples/train_digits.py [--linen] [--checkpoint DIR]

The digits are the 1797 scans of 8 x 8 pixels that come with scikit-learn. A network of
three layers learns 1437 of them and is judged on the other 360. Its gradients are then
compared with those of the naive formula and with float64, and its learning curves and
mistakes are drawn in a PNG. With ``--checkpoint`` every epoch is saved, and a run that
was interrupted goes on from there to the same parameters, bit for bit.
"""

import argparse
import io
import logging
import os
import sys
import textwrap
import zlib
from functools import partial
from pathlib import Path
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen, nnx
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxlinear.linen
import jaxlinear.nnx

PIXELS, CLASSES = 64, 10
TRAINING_IMAGES, HELD_OUT_IMAGES = 1437, 360
LAYERS = ("layer1", "layer2", "layer3")


# The model, in both APIs of Flax. All that follows needs its parameters,
# {"layer1": {"weight": (out, in), "bias": (out,)}, ...}, and a function that applies
# them to images: apply(params, x (*, 64)) -> logits (*, 10).


class NnxClassifier(nnx.Module):
    def __init__(self, hidden, rngs):
        self.layer1 = jaxlinear.nnx.Linear(PIXELS, hidden, rngs=rngs)
        self.layer2 = jaxlinear.nnx.Linear(hidden, hidden, rngs=rngs)
        self.layer3 = jaxlinear.nnx.Linear(hidden, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.layer1(x))
        x = jax.nn.relu(self.layer2(x))
        return self.layer3(x)


class LinenClassifier(linen.Module):
    hidden: int

    @linen.compact
    def __call__(self, x):
        x = jax.nn.relu(jaxlinear.linen.Linear(self.hidden, name="layer1")(x))
        x = jax.nn.relu(jaxlinear.linen.Linear(self.hidden, name="layer2")(x))
        return jaxlinear.linen.Linear(CLASSES, name="layer3")(x)


def nnx_classifier(hidden, seed):
    graph, params = nnx.split(NnxClassifier(hidden, nnx.Rngs(seed)), nnx.Param)
    return nnx.to_pure_dict(params), lambda params, x: nnx.merge(graph, params)(x)


def linen_classifier(hidden, seed):
    model = LinenClassifier(hidden)
    params = model.init(jax.random.key(seed), jnp.ones((1, PIXELS)))["params"]
    return params, lambda params, x: model.apply({"params": params}, x)


# Training


def load_data(seed):
    """Images (*, 64) in [0, 1] and labels (*,): to train on, and held out."""
    images, labels = load_digits(return_X_y=True)
    train_images, held_out_images, train_labels, held_out_labels = train_test_split(
        (images / 16).astype(np.float32),
        labels.astype(np.int32),
        train_size=TRAINING_IMAGES,
        test_size=HELD_OUT_IMAGES,
        stratify=labels,
        random_state=seed,
    )
    return (train_images, train_labels), (held_out_images, held_out_labels)


def make_optimizer(steps_per_epoch):
    # The rate falls by the same factor in every epoch, however many there are, so that
    # a finished run can be resumed with more of them.
    rate = optax.exponential_decay(3e-3, steps_per_epoch, decay_rate=0.9)
    return optax.adamw(rate, weight_decay=1e-2)


def shift(key, images):
    """The images, each moved by up to 0.7 pixels along both axes.

    1437 images are few: without this one percent less of the held-out ones is right.
    """
    offsets = jax.random.uniform(key, (len(images), 2), minval=-0.7, maxval=0.7)

    def move(image, offset):
        return jax.image.scale_and_translate(
            image, (8, 8), (0, 1), jnp.ones(2), offset, "linear"
        )

    return jax.vmap(move)(images.reshape(-1, 8, 8), offsets).reshape(images.shape)


def loss_and_accuracy(apply, params, images, labels):
    logits = apply(params, images)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, (logits.argmax(axis=-1) == labels).mean()


def make_train_step(apply, optimizer):
    differentiate = jax.value_and_grad(loss_and_accuracy, argnums=1, has_aux=True)

    @jax.jit
    def train_step(state, key, images, labels):
        params, opt_state = state["params"], state["opt_state"]
        metrics, grads = differentiate(apply, params, shift(key, images), labels)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return {"params": params, "opt_state": opt_state}, metrics

    return train_step


def train_epoch(train_step, state, data, args, epoch):
    """The state after one more pass over the images, and the mean loss and accuracy."""
    images, labels = data
    # What an epoch draws depends on the seed and its number alone: a resumed run sees
    # what the interrupted one would have seen.
    order = np.random.default_rng((args.seed, epoch)).permutation(len(images))
    steps = len(order) // args.batch_size
    batches = order[: steps * args.batch_size].reshape(steps, args.batch_size)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(args.seed), epoch), steps)
    metrics = []
    for key, batch in zip(keys, batches, strict=True):
        state, step_metrics = train_step(state, key, images[batch], labels[batch])
        metrics.append(step_metrics)
    return state, np.mean(metrics, axis=0)


def train(apply, optimizer, state, history, data, args):
    """Yield the state and the history after each of the epochs that are left."""
    train_data, (images, labels) = data
    train_step = make_train_step(apply, optimizer)
    evaluate = jax.jit(partial(loss_and_accuracy, apply))
    for epoch in range(len(history) + 1, args.epochs + 1):
        state, metrics = train_epoch(train_step, state, train_data, args, epoch)
        metrics = (*metrics, *evaluate(state["params"], images, labels))
        history = [*history, [float(metric) for metric in metrics]]
        yield state, history


def progress_bar(console, epochs):
    bar = Progress(
        *("epoch {task.completed}/{task.total}", BarColumn(), "{task.description}"),
        console=console,
        disable=not console.is_terminal,
    )
    bar.add_task("", total=epochs)
    return bar


def report(bar, history, epochs):
    loss, _, _, accuracy = history[-1]
    summary = f"loss {loss:.4f}, held-out accuracy {accuracy:.2%}"
    bar.update(bar.task_ids[0], completed=len(history), description=summary)
    if bar.disable:
        print(f"epoch {len(history)}/{epochs}: {summary}", flush=True)


# Checkpoints


def open_checkpoints(directory):
    """The manager of a folder that is new, empty or holds checkpoints."""
    path = Path(directory).absolute()
    wrong = f"--checkpoint: expected a folder for checkpoints, got {directory!r}"
    if not directory:  # Path("") is the current folder.
        refuse(wrong)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # A run that is killed while it saves for the first time leaves such a name.
        found = [p.name for p in path.iterdir() if "orbax-checkpoint-tmp" not in p.name]
    except OSError as error:
        refuse(f"{wrong}: {error.strerror}")
    if not os.access(path, os.W_OK | os.X_OK):
        refuse(f"{wrong}: no permission to write in it")
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, enable_async_checkpointing=False
    )
    manager = ocp.CheckpointManager(path, options=options)
    if found and manager.latest_step() is None:
        refuse(f"{wrong}, which holds {min(found)!r} and no checkpoint")
    return manager


def settings(args):
    """What cannot change on the way without making it another run."""
    names = ("linen", "hidden", "batch_size", "seed")
    return {name: getattr(args, name) for name in names}


def checksum(state):
    """Orbax notices damaged files, but not damaged numbers in them."""
    return zlib.crc32(b"".join(np.asarray(a).tobytes() for a in jax.tree.leaves(state)))


def save(manager, state, history, args):
    progress = {"settings": settings(args), "history": history}
    progress["checksum"] = checksum(state)
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)
    )
    manager.save(len(history), args=items)


def restore(manager, state, args):
    """The state and the history as last saved, or ``state`` if nothing is saved."""
    epoch = manager.latest_step()
    if epoch is None:
        return state, []
    progress = read(manager, epoch, "progress", ocp.args.JsonRestore())
    if not isinstance(progress, dict) or set(progress) != {
        "settings",
        "history",
        "checksum",
    }:
        refuse_checkpoint(manager, epoch, "it is not one of them")
    refuse_another_run(args, progress["settings"], epoch, manager.directory)
    state = read(manager, epoch, "state", ocp.args.StandardRestore(state))
    if checksum(state) != progress["checksum"]:
        refuse_checkpoint(manager, epoch, "its numbers have changed")
    return state, progress["history"]


def read(manager, epoch, name, how):
    """One item of a checkpoint; a file that is damaged is refused."""
    # What fails is raised here, but until the program ends threads of Orbax print
    # tracebacks of it as well: give them nothing to print on.
    stderr, sys.stderr = sys.stderr, io.StringIO()
    try:
        item = manager.restore(epoch, args=ocp.args.Composite(**{name: how}))[name]
    except Exception as error:  # A damaged file can raise anything.
        refuse_checkpoint(manager, epoch, textwrap.shorten(str(error), 160))
    sys.stderr = stderr
    return item


def refuse_checkpoint(manager, epoch, reason) -> NoReturn:
    refuse(
        "--checkpoint: expected checkpoints of this program, got"
        f" {str(manager.directory / str(epoch))!r}: {reason}"
    )


def refuse_another_run(args, saved, epoch, directory):
    given = settings(args)
    for name in given:
        if given[name] != saved.get(name):
            refuse(
                f"--{name.replace('_', '-')}: expected {saved.get(name)}, as in the run"
                f" saved in {str(directory)!r}, got {given[name]}"
            )
    if args.epochs < epoch:
        refuse(
            f"--epochs: expected at least {epoch}, as many as are saved in"
            f" {str(directory)!r}, got {args.epochs}"
        )


# The gradients, against those of the naive formula and against float64


def naive_apply(params, x):
    """The same model with every layer written as x @ W.T + b."""

    def layer(name, x):
        return x @ params[name]["weight"].T + params[name]["bias"]

    x = jax.nn.relu(layer("layer1", x))
    x = jax.nn.relu(layer("layer2", x))
    return layer("layer3", x)


def float64_operands(params, images, labels):
    """X and G = dLoss/dY of each layer: backpropagation written out in NumPy."""
    params = jax.tree.map(lambda param: np.asarray(param, np.float64), params)
    W1, W2, W3 = (params[name]["weight"] for name in LAYERS)
    b1, b2, b3 = (params[name]["bias"] for name in LAYERS)
    X1 = images.astype(np.float64)
    X2 = np.maximum(X1 @ W1.T + b1, 0)
    X3 = np.maximum(X2 @ W2.T + b2, 0)
    logits = X3 @ W3.T + b3
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    G3 = (probabilities - np.eye(CLASSES)[labels]) / len(labels)
    G2 = (G3 @ W3) * (X3 > 0)
    G1 = (G2 @ W2) * (X2 > 0)
    return {"layer1": (X1, G1), "layer2": (X2, G2), "layer3": (X3, G3)}


def float32_gradients(apply, params, images, labels):
    """Of each parameter: its name, then ours, the naive formula's and float64's."""

    def loss(params, apply):
        return loss_and_accuracy(apply, params, images, labels)[0]

    gradient = jax.jit(jax.grad(loss), static_argnames="apply")
    ours, naive = gradient(params, apply=apply), gradient(params, apply=naive_apply)
    for name, (X, G) in float64_operands(params, images, labels).items():
        for key, exact in (("weight", G.T @ X), ("bias", G.sum(axis=0))):
            yield f"{name}.{key}", ours[name][key], naive[name][key], exact


def bfloat16_gradients(params, images, labels):
    """The same in mixed precision, layer by layer.

    Through the whole model each of the three would round other activations. So every
    layer is given one X and one G, which are rounded to bfloat16 beforehand.
    """

    def ours(weight, bias):
        return jaxlinear.linear(X, weight, bias, dtype=jnp.bfloat16)

    def naive(weight, bias):
        return X @ weight.astype(jnp.bfloat16).T + bias.astype(jnp.bfloat16)

    for name, operands in float64_operands(params, images, labels).items():
        X, G = (jnp.asarray(operand, jnp.bfloat16) for operand in operands)
        weight, bias = params[name]["weight"], params[name]["bias"]
        grads = [jax.vjp(layer, weight, bias)[1](G) for layer in (ours, naive)]
        X64, G64 = np.asarray(X, np.float64), np.asarray(G, np.float64)
        exact = G64.T @ X64, G64.sum(axis=0)
        for key, *row in zip(("weight", "bias"), *grads, exact, strict=True):
            yield f"{name}.{key}", *row


def gradient_table(title, rows):
    """Relative errors in the Frobenius norm, and how far ours and the naive differ."""
    table = Table(title=title, title_justify="left")
    table.add_column("gradient of")
    for heading in ("ours\nvs float64", "naive\nvs float64", "largest\n|ours - naive|"):
        table.add_column(heading, justify="right")
    for name, *grads in rows:
        ours, naive, exact = (np.asarray(grad, np.float64) for grad in grads)
        # A parameter that no image reaches has the gradient zero.
        norm = max(float(np.linalg.norm(exact)), np.finfo(np.float64).tiny)
        errors = (np.linalg.norm(grad - exact) / norm for grad in (ours, naive))
        table.add_row(name, *(f"{x:.1e}" for x in (*errors, abs(ours - naive).max())))
    return table


# The picture


def draw(path, history, images, labels, logits):
    """A PNG: the learning curves, and under them the mistakes made most surely."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    parts = figure.subfigures(2, 1, height_ratios=(2, 1), hspace=0.05, squeeze=False)
    draw_curves(parts[0, 0], np.array(history))
    draw_mistakes(parts[1, 0], images, labels, logits)
    figure.savefig(path, dpi=120, pad_inches=0.1, bbox_inches="tight")


def draw_curves(figure, history):
    """Curves of a history (epochs, 4): loss and accuracy in training, then held out."""
    left, right = figure.subplots(1, 2)
    for column, label in ((0, "training (shifted images)"), (2, "held out")):
        loss, accuracy = history[:, column], 100 * history[:, column + 1]
        epochs = range(1, len(history) + 1)
        left.semilogy(epochs, loss, ".-", label=label)
        right.plot(epochs, accuracy, ".-", label=label)
    left.set(title="loss", xlabel="epoch")
    right.set(title="accuracy (%)", xlabel="epoch")
    for axes in (left, right):
        axes.set_xlim(0.5, len(history) + 0.5)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.legend()


def draw_mistakes(figure, images, labels, logits, shown=8):
    predicted = logits.argmax(axis=1)
    surest = np.argsort(-logits.max(axis=1))
    wrong = [i for i in surest if predicted[i] != labels[i]]
    title = f"{len(wrong)} of {len(labels)} held-out digits are misclassified"
    if len(wrong) > shown:
        title += f", the surest {shown} here"
    figure.suptitle(title)
    wrong = wrong[:shown]
    panels = figure.subplots(1, max(len(wrong), 1), squeeze=False)[0]
    for axes in panels:
        axes.set_axis_off()
    for axes, i in zip(panels, wrong, strict=False):
        axes.imshow(images[i].reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
        axes.set_title(f"true {labels[i]}\npredicted {predicted[i]}", fontsize=10)


# Command line


def refuse(message) -> NoReturn:
    """End the program with one line on stderr and the status of a wrong command."""
    line = " ".join(f"train_digits.py: error: {message}".split())
    print(line, file=sys.__stderr__)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    def error(self, message) -> NoReturn:  # Without the usage, which argparse prints.
        refuse(message.removeprefix("argument "))


def integer(low, high):
    """A function that reads an integer between two bounds from the command line."""

    def read(text):
        wrong = f"expected an integer from {low} to {high}, got {text!r}"
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(wrong) from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(wrong)
        return value

    return read


def png(text):
    """A path at which a PNG can be written."""
    path = Path(text)
    if path.suffix != ".png" or path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a .png file, got {text!r}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(
            f"expected a file in a folder that can be written to, got {text!r}"
        )
    return path


def parse_arguments():
    parser = Parser(
        description="Train a classifier of handwritten digits with jaxlinear.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    count = partial(flag, metavar="N")
    flag("--linen", action="store_true", help="use Flax Linen instead of NNX")
    count("--epochs", type=integer(1, 10_000), default=30, help="passes over the data")
    count("--batch-size", type=integer(1, TRAINING_IMAGES), default=32, help="images")
    count("--hidden", type=integer(1, 4096), default=256, help="hidden layers' width")
    count("--seed", type=integer(0, 2**32 - 1), default=0, help="of all random choices")
    flag("--plot", type=png, default="train_digits.png", help="the PNG to write")
    flag("--checkpoint", metavar="DIR", help="save every epoch in DIR, or resume there")
    return parser.parse_args()


def judge(console, apply, params, images, labels, history, plot):
    logits = np.asarray(apply(params, images))
    right = (logits.argmax(axis=1) == labels).sum()
    share = f"{right / len(labels):.2%} ({right} of {len(labels)} images)"
    console.print(f"held-out accuracy: {share}", highlight=False)
    rows = float32_gradients(apply, params, images, labels)
    console.print(gradient_table("Gradients in float32", rows))
    rows = bfloat16_gradients(params, images, labels)
    console.print(gradient_table("Gradients of each layer in bfloat16", rows))
    draw(plot, history, images, labels, logits)
    console.print(f"curves and mistakes: {plot}", highlight=False, soft_wrap=True)


def main():
    args = parse_arguments()
    logging.disable()  # Orbax logs each of its steps; what fails is raised.
    manager = None if args.checkpoint is None else open_checkpoints(args.checkpoint)
    classifier = linen_classifier if args.linen else nnx_classifier
    params, apply = classifier(args.hidden, args.seed)
    optimizer = make_optimizer(TRAINING_IMAGES // args.batch_size)
    state, history = {"params": params, "opt_state": optimizer.init(params)}, []
    if manager:
        state, history = restore(manager, state, args)

    console = Console()
    data = load_data(args.seed)
    epochs = train(apply, optimizer, state, history, data, args)
    with progress_bar(console, args.epochs) as bar:
        bar.update(bar.task_ids[0], completed=len(history))
        for state, history in epochs:
            if manager:
                save(manager, state, history, args)
            report(bar, history, args.epochs)
    judge(console, apply, state["params"], *data[1], history, args.plot)


if __name__ == "__main__":
    main()
