#!/usr/bin/env bash
# tokamax 0.0.17, JAX 0.12.0.1: `linear_softmax_cross_entropy_loss` by
# `implementation="chunked_xla"` pads the vocabulary with zeros to a multiple of its block
# of 2,048, and its loss counts them: each class of the padding adds exp(0) to the sum of
# exponentials. By "xla" the loss is right.
# Output: classes, the mean loss by "xla" and by "chunked_xla", and in float64 without and
# with the padding
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python in python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python; do
    "$python" --version >/dev/null 2>&1 && break
done
"$python" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet jax==0.12.0.1 jaxlib==0.12.0.1 tokamax==0.0.17
JAX_PLATFORMS=cpu "$folder/env/bin/python" - >"$folder/found" <<'PYTHON'
import jax.numpy as jnp
import numpy as np
import tokamax


def exact(logits, labels):
    at_label = logits[np.arange(len(labels)), labels]
    return np.mean(np.log(np.exp(logits).sum(-1)) - at_label)


generator = np.random.default_rng(0)
for classes in 4096, 4097, 50257:
    x = generator.standard_normal((1024, 64), np.float32)
    weight = generator.standard_normal((64, classes), np.float32) / 8
    labels = generator.integers(classes, size=1024, dtype=np.int32)
    logits = x.astype("float64") @ weight.astype("float64")
    padded = np.pad(logits, ((0, 0), (0, -classes % 2048)))
    found = [
        tokamax.linear_softmax_cross_entropy_loss(
            *(jnp.asarray(a) for a in (x, labels, weight)),
            reduction="mean",
            implementation=implementation,
        )
        for implementation in ("xla", "chunked_xla")
    ]
    found += [exact(logits, labels), exact(padded, labels)]
    print(classes, *(f"{loss:.2f}" for loss in found))
PYTHON
cat "$folder/found"
diff "$folder/found" - <<'EXPECTED'
4096 8.79 8.79 8.79 8.79
4097 8.84 9.11 8.84 9.11
50257 11.33 11.34 11.33 11.34
EXPECTED
