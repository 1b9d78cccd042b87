#!/usr/bin/env bash
# JAX 0.10.2 and 0.12.0.1, XLA for CPUs: the gradient of a float32 weight that is cast to
# bfloat16 for its product is rounded to bfloat16, says the program. Under `jit` XLA leaves
# the rounding out for `x @ weight.T`, where a transpose stands between the product and the
# cast, and not for `x @ kernel`. So a mixed-precision gradient has 8 or 24 significant
# bits, by the layout of the weight and by `jit`.
# Output: version, formula, and whether the gradient is rounded outside and under `jit`
set -euo pipefail
for python in python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python; do
    "$python" --version >/dev/null 2>&1 && break
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/program.py" <<'PYTHON'
import jax

draw = jax.random.normal
x = draw(jax.random.key(0), (512, 256), "bfloat16")
G = draw(jax.random.key(1), (512, 128), "bfloat16")
kernel = draw(jax.random.key(2), (256, 128))


def of_weight(weight):
    return x @ weight.astype("bfloat16").T


def of_kernel(kernel):
    return x @ kernel.astype("bfloat16")


def gradient(function):
    return lambda parameter, G: jax.vjp(function, parameter)[1](G)[0]


def is_rounded(a):
    return (a == a.astype("bfloat16")).all()


for function, parameter in (of_weight, kernel.T), (of_kernel, kernel):
    outside = gradient(function)(parameter, G)
    inside = jax.jit(gradient(function))(parameter, G)
    print(jax.__version__, function.__name__, is_rounded(outside), is_rounded(inside))
PYTHON
for version in 0.12.0.1 0.10.2; do
    "$python" -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "jax==$version" "jaxlib==$version"
    JAX_PLATFORMS=cpu "$folder/$version/bin/python" "$folder/program.py" >>"$folder/found"
done
cat "$folder/found"
diff "$folder/found" - <<'EXPECTED'
0.12.0.1 of_weight True False
0.12.0.1 of_kernel True True
0.10.2 of_weight True False
0.10.2 of_kernel True True
EXPECTED
