#!/usr/bin/env bash
# PyTorch 2.13.0: where all tokens are ignored, `linear_cross_entropy` with `options` gives
# gradients that are NaN. Without options they are zero, as those of `cross_entropy` are.
# The mean loss is NaN in both.
# Output: the options, the loss, and the gradients of x and of the weight summed
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0
"$folder/env/bin/python" -W ignore - >"$folder/found" <<'PYTHON'
import torch
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import linear_cross_entropy

x = torch.ones(8, 4, requires_grad=True)
weight = torch.ones(16, 4, requires_grad=True)
ignored = torch.full((8,), -100)
for options in None, LinearCrossEntropyOptions():
    loss = linear_cross_entropy(x, weight, ignored, options=options)
    gradients = torch.autograd.grad(loss, (x, weight))
    print(options and "default", loss.item(), *(g.sum().item() for g in gradients))
PYTHON
cat "$folder/found"
diff "$folder/found" - <<'EXPECTED'
None nan 0.0 0.0
default nan nan nan
EXPECTED
