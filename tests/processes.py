"""Runs in processes of their own, one or several that know of each other, as ``accelerate launch`` starts them.

They are forked from a server that has imported everything once, so that each starts at once.
"""

import multiprocessing
import os
import socket
import subprocess
import sys

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["wadi.distill.loop", "wadi.cli.main", "diffusers", "transformers", "accelerate", "peft.tuners"])


WITHOUT_WADI = """
import sys
class Absent:
    def find_spec(self, name, *_):
        if name == "wadi" or name.startswith("wadi."):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""


def run_without_wadi(code, *arguments):
    """Run ``code`` in a process that cannot import this package. Return the finished process."""
    return subprocess.run([sys.executable, "-c", WITHOUT_WADI + code, *arguments], capture_output=True, text=True, check=False)


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def _begin(act, arguments, world, index, port, log):
    import torch

    torch.set_num_threads(1)
    with open(log, "a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    if world > 1:
        os.environ |= {
            "RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
    sys.exit(act(*arguments, index))


def start(world, act, *arguments, log):
    """``act(*arguments, index)`` in ``world`` processes, whose output goes to ``log``-0, ``log``-1, ..."""
    port = free_port()
    found = []
    for index in range(world):
        place = f"{log}-{index}"
        found.append(_server.Process(target=_begin, args=(act, arguments, world, index, port, place)))
        found[-1].start()
    return found


def finish(started, seconds=240):
    """Their exit codes; a process that hangs is killed and has -9."""
    for process in started:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in started]


def distilled(config, index):
    """What ``wadi distill`` does with a config, as an exit code."""
    from wadi.distill.loop import distill
    from wadi.errors import Interrupted, WadiError

    try:
        distill(config)
    except Interrupted as stopped:
        return 128 + stopped.signal
    except WadiError as error:
        print(error, flush=True)
        return 2
    return 0


def distilled_on_a_full_disk(config, size, index):
    """`distilled`, where no file grows beyond ``size`` bytes."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return distilled(config, index)


def stopped_at(config, step, who, number, index):
    """`distilled`, with signal ``number`` sent at the start of ``step`` to process ``who`` alone."""
    from wadi.distill import loop

    plain = loop.train_step

    def train_step(backbone, batch, timesteps, objective, config, state):
        if state.step == step and index == who:
            os.kill(os.getpid(), number)
        return plain(backbone, batch, timesteps, objective, config, state)

    loop.train_step = train_step
    return distilled(config, index)
