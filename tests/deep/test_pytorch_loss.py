"""Our loss beside PyTorch's function of the same name, where both have an option."""

import numpy as np
import pytest
from loss_oracle import loss_and_gradients, problem, relative

from jaxlinear import linear_cross_entropy

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
if not hasattr(torch.nn.functional, "linear_cross_entropy"):
    pytest.skip("This PyTorch has no linear_cross_entropy", allow_module_level=True)

CLASSES = 600


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("smoothing", "is_chunked"), [(0.0, False), (0.0, True), (0.1, False)]
)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 7])
def test_values_and_gradients_are_those_of_pytorch(
    reduction, smoothing, is_chunked, has_bias, ignore_index
):
    h, weight, labels, bias, _ = problem(CLASSES, (60,))
    labels = abs(labels) if ignore_index == 7 else labels  # PyTorch refuses others.
    labels = labels.at[:3].set(ignore_index)
    arrays = (h, weight, bias) if has_bias else (h, weight)
    options = {
        "reduction": reduction,
        "label_smoothing": smoothing,
        "ignore_index": ignore_index,
    }
    h, weight, *biases = (torch.tensor(np.asarray(a)).requires_grad_() for a in arrays)
    theirs = torch.nn.functional.linear_cross_entropy(
        *(h, weight, torch.tensor(np.asarray(labels)).long()),
        linear_bias=biases[0] if biases else None,
        options=torch.nn.LinearCrossEntropyOptions() if is_chunked else None,
        **options,
    )
    theirs.sum().backward()

    def loss(h, weight, *biases):
        return linear_cross_entropy(h, weight, labels, *biases, **options)

    found, gradients = loss_and_gradients(loss, *arrays)
    assert relative(found, theirs.sum().detach().numpy()) <= 1e-6
    assert relative(loss(*arrays), theirs.detach().numpy()) <= 1e-6
    for gradient, tensor in zip(gradients, (h, weight, *biases), strict=True):
        assert relative(gradient, tensor.grad.numpy()) <= 1e-6


def test_the_mean_of_no_token_is_zero_where_that_of_pytorch_is_nan():
    h, weight, labels, _, _ = problem(CLASSES, (60,))
    labels = labels.at[:].set(-100)
    tensors = [torch.tensor(np.asarray(a)) for a in (h, weight)]
    target = torch.tensor(np.asarray(labels)).long()
    assert torch.nn.functional.linear_cross_entropy(*tensors, target).isnan()
    assert linear_cross_entropy(h, weight, labels) == 0
