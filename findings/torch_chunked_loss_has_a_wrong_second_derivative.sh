#!/usr/bin/env bash
# PyTorch 2.13.0: with the option `allow_retain_graph=True` the second derivative of the
# square of `linear_cross_entropy` is wrong: the second derivative of the loss is taken
# as zero, and nothing is raised. The documentation calls higher orders unsupported;
# without the option they raise an error.
# The loss is log(1 + exp(x)) at x = 0: log 2, with the derivatives 1/2 and 1/4.
# Output: the options, and the second derivative of its square, 1/2 + log(2) / 2 = 0.8466
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0
"$folder/env/bin/python" -W ignore - >"$folder/found" <<'PYTHON'
import torch
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import linear_cross_entropy

weight = torch.tensor([[0.0], [1.0]])
label = torch.tensor([0])
for options in None, LinearCrossEntropyOptions(allow_retain_graph=True):
    x = torch.zeros(1, 1, requires_grad=True)
    loss = linear_cross_entropy(x, weight, label, options=options)
    (first,) = torch.autograd.grad(loss**2, x, create_graph=True)
    (second,) = torch.autograd.grad(first, x)
    print(options and "allow_retain_graph", f"{second.item():.4f}")
PYTHON
cat "$folder/found"
diff "$folder/found" - <<'EXPECTED'
None 0.8466
allow_retain_graph 0.5000
EXPECTED
