#!/usr/bin/env bash
# PyTorch 2.13.0: `linear_cross_entropy` in bfloat16 with the default
# `LinearCrossEntropyOptions()` sums the losses of its chunks of tokens in bfloat16, and
# their weight gradients, though the option `acc_dtype`, "Dtype for internal accumulation",
# is float32. With 256 chunks the mean loss stops growing at 8, where it is 10.2, and the
# weight gradient has 8 times the error. Without options there are no chunks.
# Output: the options, then the mean loss, its value in float64, and the relative error of
# the weight gradient
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0
"$folder/env/bin/python" -W ignore - >"$folder/found" <<'PYTHON'
import torch
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import linear_cross_entropy

torch.manual_seed(0)
x = torch.randn(4096, 64).bfloat16()
weight = (torch.randn(16384, 64) / 8).bfloat16()
labels = torch.randint(16384, (4096,))


def results(dtype, options):
    W = weight.to(dtype, copy=True).requires_grad_()
    loss = linear_cross_entropy(x.to(dtype), W, labels, options=options)
    loss.backward()
    return loss.item(), W.grad.double()


exact_loss, exact_gradient = results(torch.float64, None)
for options in None, LinearCrossEntropyOptions():
    loss, gradient = results(torch.bfloat16, options)
    error = (gradient - exact_gradient).norm() / exact_gradient.norm()
    print(options and "default", f"{loss:.1f} {exact_loss:.1f} {error:.3f}")
PYTHON
cat "$folder/found"
diff "$folder/found" - <<'EXPECTED'
None 10.1 10.2 0.002
default 8.0 10.2 0.014
EXPECTED
