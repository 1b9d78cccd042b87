"""Devices that are not here, as their compilers are told of them."""

import importlib.util
import math
import pathlib

SETTINGS = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_LOG_DIR": "disabled",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Environment variables, to be set before JAX is imported."""

# Axes of the torus, and the most chips that the compilers here take.
TPUS = {"v5e": (2, 256), "v6e": (2, 256), "v5p": (3, 8960), "tpu7x": (3, 8192)}
GPUS = ["h100", "b200"]
TARGETS = [*TPUS, *GPUS]
GPUS_OF_A_HOST = 8


def platform(target):
    """JAX's name for it. The target "cpu" is this machine."""
    return "tpu" if target in TPUS else "cuda" if target in GPUS else "cpu"


def compiler(target):
    """The package that has the compiler."""
    names = {"tpu": "libtpu", "cuda": "jax_cuda12_plugin", "cpu": "jaxlib"}
    return names[platform(target)]


def absent(targets):
    """The compilers of these targets that are not installed, in words, or None."""
    compilers = sorted(set(map(compiler, targets)))
    absent = [name for name in compilers if importlib.util.find_spec(name) is None]
    names = " and ".join(absent)
    if not absent:
        return None
    return f"{names} must be installed: pip install -e '.[aot]'"


def missing(target, chips):
    """Why ``target`` cannot be compiled for here, or None."""
    if why := absent([target]):
        return why
    if target in TPUS and chips > TPUS[target][1]:
        return f"the compiler has no topology of more than {TPUS[target][1]} chips"
    return None


def devices(target, chips):
    """``chips`` devices of a topology, in a line. A chip of TPU 7x is two devices."""
    import jax
    from jax.experimental import topologies

    if target == "cpu":
        return jax.devices("cpu")
    if target in TPUS:
        shape = torus(max(chips, 4), TPUS[target][0])
        name = f"{target}:{'x'.join(map(str, shape))}"
        found = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
        return found[: chips * len(found) // math.prod(shape)]
    hosts = math.ceil(chips / GPUS_OF_A_HOST)
    shape = f"1x{hosts}x{min(chips, GPUS_OF_A_HOST)}"
    config = pathlib.Path(__file__).with_name(f"{target}.txtpb").read_text()
    return topologies.get_topology_desc(
        platform="cuda", topology_name=shape, topology=shape, target_config=config
    ).devices


def torus(chips, axes):
    """Sizes of the axes of a torus, as even as powers of two allow."""
    exponent = chips.bit_length() - 1
    if 1 << exponent != chips:
        raise ValueError(f"`chips` must be a power of two, got {chips}")
    sizes = [1 << (exponent + i) // axes for i in range(axes)]
    # Hosts have 2 × 2 × 1 chips, by which a topology must be divisible.
    return sizes[::-1] if axes == 3 and chips < 64 else sizes
