"""Record what PyTorch's linear layer computes, for machines without PyTorch.

    python tests/golden/record_pytorch.py

writes pytorch_linear.npz beside this file. The inputs are PyTorch's own sample
inputs for ``torch.nn.functional.linear`` (its OpInfo of that name): with and without a
bias, two pairs of features, four batches, and one input of five axes, in each dtype
that it supports on CPU, with values in (-2, 2).
"""

import itertools
import pathlib

import numpy as np
import torch

GOLDEN = pathlib.Path(__file__).with_name("pytorch_linear.npz")
DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
FEATURES = [(3, 4), (8, 8)]
BATCHES = [(), (0,), (8,), (2, 3)]


def samples():
    """(bias or not, leading axes, in_features, out_features) of each sample."""
    for bias, features, batch in itertools.product([True, False], FEATURES, BATCHES):
        yield bias, batch, *features
    for bias in (False, True):
        yield bias, (2, 1, 2, 1), 2, 4


def pytorch_linear(x, weight, bias, cotangent):
    """PyTorch's output and gradients, None for the bias gradient without a bias."""
    arguments = [x, weight] if bias is None else [x, weight, bias]
    arguments = [a.detach().requires_grad_() for a in arguments]
    y = torch.nn.functional.linear(*arguments)
    gradients = torch.autograd.grad(y, arguments, cotangent)
    return y.detach(), *gradients, *([None] if bias is None else [])


def draw(generator, shape, dtype):
    """Values in (-2, 2) that are exact in every dtype of at least eight bits."""
    eighths = torch.randint(-15, 16, (2, *shape), generator=generator) / 8
    values = torch.complex(*eighths) if dtype.is_complex else eighths[0]
    return values.to(dtype)


def to_numpy(tensor):
    """``tensor`` in float64 or complex128: NumPy has no bfloat16."""
    wide = torch.complex128 if tensor.dtype.is_complex else torch.float64
    return tensor.to(wide).numpy()


def main():
    generator = torch.Generator().manual_seed(0)
    arrays = {}
    names = (
        "x",
        "weight",
        "bias",
        "cotangent",
        "y",
        "grad_x",
        "grad_weight",
        "grad_bias",
    )
    for name in DTYPES:
        dtype = getattr(torch, name)
        for i, (with_bias, batch, in_features, out_features) in enumerate(samples()):
            shapes = (
                (*batch, in_features),
                (out_features, in_features),
                (out_features,),
                (*batch, out_features),
            )
            x, weight, bias, cotangent = (draw(generator, s, dtype) for s in shapes)
            bias = bias if with_bias else None
            results = pytorch_linear(x, weight, bias, cotangent)
            values = (x, weight, bias, cotangent, *results)
            for key, value in zip(names, values, strict=True):
                if value is not None:
                    arrays[f"{name}/{i}/{key}"] = to_numpy(value)
    np.savez_compressed(GOLDEN, torch_version=torch.__version__, **arrays)
    print(f"{GOLDEN}: {len(arrays)} arrays of PyTorch {torch.__version__}")


if __name__ == "__main__":
    main()
