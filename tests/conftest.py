"""Helpers shared by all tests."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi

if "PYTEST_XDIST_WORKER" in os.environ:  # a thread for each worker, and for the processes that it starts
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `-n`, a worker runs all tests of a file, so that what they share is made once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


@pytest.fixture(autouse=True)
def seed():
    """The same numbers in every run, whichever tests are chosen."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real images beside the checkout, where there is one."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the images in {folder}, which are not part of the project")
    return folder


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """What is pushed to the hub is kept in a folder per repository below `root`; `made` has (repository, private)."""
    root, made = tmp_path / "hub", []

    def create_repo(api, repo_id, private, exist_ok):
        assert exist_ok
        repo_id = repo_id if "/" in repo_id else f"somebody/{repo_id}"
        made.append((repo_id, private))
        return SimpleNamespace(repo_id=repo_id)

    def file_exists(api, repo_id, filename, revision):
        return (root / repo_id / filename).exists()

    def upload_folder(api, repo_id, folder_path, **options):
        shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}", **options)

    for function in (create_repo, file_exists, upload_folder):
        monkeypatch.setattr(HfApi, function.__name__, function)
    return SimpleNamespace(root=root, made=made)


@pytest.fixture(scope="session")
def randomise():
    """Draw all that a model learns, because fresh norms, zero biases and 1e-6 layer scales hide mistakes."""

    @torch.no_grad()
    def draw(model, seed=0):
        generator = torch.Generator().manual_seed(seed)
        for name, value in model.state_dict().items():
            if not value.is_floating_point():
                continue
            if value.ndim > 1:  # weights keep the variance of what they are given, roughly
                fan_in = 4 if value.ndim == 3 else value[0].numel()  # tokens and positions are 3-D
                value.normal_(std=fan_in**-0.5, generator=generator)
            elif name.endswith(("bias", "running_mean")):
                value.normal_(std=0.2, generator=generator)
            elif name.endswith("gamma"):  # layer scales: as large as norms, deep networks would outgrow float32
                value.uniform_(0.1, 0.5, generator=generator)
            else:  # norms, variances
                value.uniform_(0.5, 1.5, generator=generator)
        return model.eval()

    return draw


@pytest.fixture(scope="session")
def assert_equals_reference():
    """Print the worst difference to a reference implementation, and fail where it is over 1e-4."""

    def check(what, ours, reference, tolerance=1e-4):
        assert ours.shape == reference.shape, f"{what}: {tuple(ours.shape)} for {tuple(reference.shape)}"
        assert reference.std() > 0.01, f"{what}: the reference hardly varies, so that the comparison says nothing"
        worst = (ours - reference).abs().max().item()
        print(f"{what} {tuple(ours.shape)}: worst {worst:.1e}, {worst / reference.abs().max().item():.1e} relative")
        assert worst <= tolerance, what

    return check
