#!/usr/bin/env bash
# PyTorch 2.13.0: `linear_cross_entropy` with `allow_retain_graph=True` gives a wrong second
# derivative of the squared loss and raises nothing: the curvature of the loss is missing.
# Its documentation says that higher-order derivatives are unsupported. Without that option
# they raise an error.
# The program: f(x) = loss(x)^2 of one logit difference, x = 0, where the loss is log 2, its
# derivative 1/2 and its second derivative 1/4
# Output: the options, then f''(0), which is 1/2 + log(2) / 2 = 0.8466
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
