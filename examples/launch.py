"""Start a program in several processes on this machine, as ``jax.distributed`` needs.

    python examples/launch.py 2 examples/train_distributed.py --sharding fsdp

Each process gets ``--launched`` with the number of processes and its own number. They
use loopback. If this host's name has another address, JAX's collectives would listen
there, and you must pass ``--listen`` first. If one process fails, the others are ended.
"""

import argparse
import os
import socket
import subprocess
import sys
import time


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def wait(ranks):
    """Wait until all have succeeded or one has failed."""
    codes = [None]
    while None in codes:
        time.sleep(0.1)
        codes = [rank.poll() for rank in ranks]
        for i, code in enumerate(codes):
            if code:
                sys.exit(
                    f"Process {i} ended with {code}, so the others are ended."
                    " Start it again to go on from the last checkpoint."
                )


def main():
    parser = argparse.ArgumentParser(
        description="Start a program in several processes."
    )
    parser.add_argument("--listen", action="store_true", help="not on loopback alone")
    parser.add_argument("processes", type=int)
    parser.add_argument("program")
    options, flags = parser.parse_known_args()
    if options.processes < 1:
        parser.error(f"argument processes: must be positive, got {options.processes}")
    listening = socket.gethostbyname(socket.gethostname())
    if not (options.listen or listening.startswith("127.")):
        sys.exit(
            f"The processes would listen at {listening}: pass --listen to let them."
        )
    address = free_address()
    environment = {
        **os.environ,
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_COORDINATOR_BIND_ADDRESS": address,
    }
    command = [sys.executable, options.program, *flags, "--launched"]
    command += [str(options.processes)]
    ranks = [
        subprocess.Popen([*command, str(i)], env=environment)
        for i in range(options.processes)
    ]
    try:
        wait(ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


if __name__ == "__main__":
    main()
