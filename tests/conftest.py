import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches the network

import pytest
import tiny
import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory):
    """A tiny Stable Diffusion pipeline saved to disk, epsilon-prediction."""
    folder = tmp_path_factory.mktemp("sd")
    tiny.stable_diffusion(folder / "parts").save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("red apple\nblue car\n\n  green tree \nyellow sun\n")
    return path
