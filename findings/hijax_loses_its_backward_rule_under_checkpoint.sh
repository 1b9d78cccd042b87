#!/usr/bin/env bash
# JAX 0.10.2 and 0.12.0.1: a primitive of `jax.experimental.hijax` with rules for forward
# and for reverse mode loses the latter under `jax.checkpoint`, which transposes the rule
# for forward mode. Here they differ, to tell which one ran: 2 forward, 100 backward. A
# derivative whose backward rule chooses dtypes or clips is another one under checkpoint,
# and nothing is raised. The class has other names in the two versions.
# Output: version, then the derivatives by `jvp`, `grad`, `grad` of `jit`, and `grad` of
# `jax.checkpoint`
set -euo pipefail
for python in python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python; do
    "$python" --version >/dev/null 2>&1 && break
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/program.py" <<'PYTHON'
import jax
import jax.experimental.hijax as hijax

Primitive = getattr(hijax, "HiPrim", None) or hijax.VJPHiPrimitive


class Double(Primitive):
    def __init__(self, aval):
        self.in_avals, self.out_aval, self.params = (aval,), aval, {}
        super().__init__()

    def expand(self, x):
        return 2 * x

    def vjp_fwd(self, nonzero, x):
        return self(x), ()

    def vjp_bwd_retval(self, residuals, g):
        return (100 * g,)

    def jvp(self, primals, tangents):
        return self(*primals), 2 * tangents[0]

    def lin(self, nonzero, x):
        return self(x), ()

    def linearized(self, residuals, tangent):
        return 2 * tangent


def double(x):
    return Double(jax.typeof(x))(x)


x = jax.numpy.float32(1)
_, tangent = jax.jvp(double, (x,), (x,))
functions = double, jax.jit(double), jax.checkpoint(double)
print(jax.__version__, tangent, *(jax.grad(function)(x) for function in functions))
PYTHON
for version in 0.12.0.1 0.10.2; do
    "$python" -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "jax==$version" "jaxlib==$version"
    JAX_PLATFORMS=cpu "$folder/$version/bin/python" "$folder/program.py" >>"$folder/found"
done
cat "$folder/found"
diff "$folder/found" - <<'EXPECTED'
0.12.0.1 2.0 100.0 100.0 2.0
0.10.2 2.0 100.0 100.0 2.0
EXPECTED
