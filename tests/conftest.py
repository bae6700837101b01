import os
import signal
from contextlib import contextmanager

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches the network

import pytest
import torch

import tiny

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")))


@pytest.fixture(scope="session", autouse=True)
def signals():
    """Take signals as a terminal's program does: a process started in the background or by nohup ignores some of them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _saved(tmp_path_factory, name, **changes):
    folder = tmp_path_factory.mktemp(name)
    tiny.stable_diffusion(folder / "parts", **changes).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory):
    """A tiny Stable Diffusion pipeline saved to disk, epsilon-prediction."""
    return _saved(tmp_path_factory, "sd")


@pytest.fixture(scope="session")
def sd_v_folder(tmp_path_factory):
    """The same with v-prediction and, as Stable Diffusion 2 has them, linear projections."""
    return _saved(tmp_path_factory, "sd_v", prediction_type="v_prediction", use_linear_projection=True)


@pytest.fixture(scope="session")
def prompts_path(tmp_path_factory):
    """Four prompts in a file that no test changes."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("red apple\nblue car\ngreen tree\nyellow sun\n")
    return path


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("red apple\nblue car\n\n  green tree \nyellow sun\n")
    return path


@pytest.fixture
def full_disk():
    """``with full_disk(n):`` no file grows beyond ``n`` bytes: a write fails half way, as it does on a full disk."""
    import resource

    @contextmanager
    def limited(size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # Python ignores the signal, so that the write itself fails
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, sd_folder, prompts_path):
    """A run of three steps, asked at timestep 800, that no test changes."""
    from wadi.distill.loop import distill

    out = tmp_path_factory.mktemp("runs") / "finished"
    return distill(tiny.settings(sd_folder, prompts_path, out, student={"timesteps": [800], "lr": 0.05}))
