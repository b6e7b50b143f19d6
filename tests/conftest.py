"""Helpers shared by all tests."""

from pathlib import Path

import pytest
import torch


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
