"""What it takes to be equal to timm, the same for every family."""

import copy

import pytest
import timm
import torch

from backbones import backbone_info, build_backbone
from backbones.weights import load_weights

# Tracing takes up to 20 s a model. These, which are quick, have what it may stumble over: padding, tokens, windows,
# statistics of batches; and a model of each of the libraries that plugins front.
TRACED = (
    *("pvt_v2_b0", "deit_tiny_patch16", "mobilevit_xxs", "twins_svt_small"),
    *("timm/test_convnext", "torchvision/resnet18", "tiny_dinov2"),
)


@pytest.hookimpl(tryfirst=True)  # before marks are looked at
def pytest_collection_modifyitems(items):
    """The conformance kit's export is slow but for those."""
    quick = {f"test_conformance[{name}-export]" for name in TRACED}
    for item in items:
        if item.name.startswith("test_conformance[") and item.name.endswith("-export]") and item.name not in quick:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def on_meta():
    """Models built in the test have no numbers: for tests that look at structure alone."""
    with torch.device("meta"):
        yield


@pytest.fixture(scope="session")
def count():
    """Number of parameters of a model."""
    return lambda model: sum(p.numel() for p in model.parameters())


@pytest.fixture(scope="session")
def assert_parameters_as_published(count):
    """The classifier has exactly the published number of parameters, and the spec says so."""

    def check(name, published, timm_name=None):
        with torch.device("meta"):
            if timm_name:
                assert count(timm.create_model(timm_name, num_classes=1000)) == published
            assert count(build_backbone(name, features_only=False)) == published
        assert backbone_info(name).params == round(published / 1e6, 2)

    return check


@pytest.fixture(scope="session")
def load_pair():
    """Our classifier and our backbone with all the weights of a reference, and nothing missing or left over."""

    def load(name, reference, **options):
        models = build_backbone(name, features_only=False, **options).eval(), build_backbone(name, **options).eval()
        classifier_report, report = (load_weights(model, reference.state_dict()) for model in models)
        assert not classifier_report.missing
        assert not classifier_report.mismatched
        assert not classifier_report.unexpected
        assert not report.missing
        assert not report.mismatched
        return models

    return load


@pytest.fixture(scope="session")
def assert_equals_timm(randomise, load_pair, assert_equals_reference):
    """Logits, pre-logits and every map equal those of timm's model with the same, randomly drawn weights.

    `maps(reference, images)` yields timm's maps where they are not the last ones of `forward_intermediates`.
    """

    def check(name, timm_name, sizes=((224, 224),), maps=None, timm_options=None, **options):
        reference = randomise(timm.create_model(timm_name, num_classes=1000, **(timm_options or {})))
        classifier, backbone = load_pair(name, reference, **options)
        for size in sizes:
            images = torch.randn(1, 3, *size)
            with torch.inference_mode():
                assert_equals_reference(f"{name} logits", classifier(images), reference(images))
                pooled = classifier.forward_head(classifier.forward_features(images), pre_logits=True)
                theirs = reference.forward_head(reference.forward_features(images), pre_logits=True)
                assert_equals_reference(f"{name} pre-logits", pooled, theirs)
                if maps:
                    expected = maps(reference, images)
                else:
                    expected = reference.forward_intermediates(images, intermediates_only=True)
                expected = expected[-len(backbone.strides) :]
                for stride, ours, theirs in zip(backbone.strides, backbone(images), expected, strict=True):
                    assert_equals_reference(f"{name} stride {stride}", ours, theirs)

    return check


@pytest.fixture(scope="session")
def assert_gradients_equal():
    """Gradients of our classifier equal those of a reference with the same weights, under our names.

    In float64, because a random deep network turns the rounding of float32 into differences that could hide one.
    """

    def check(model, reference, layout=None, size=(64, 96)):
        images, upstream = torch.randn(2, 3, *size).double(), torch.randn(2, 1000).double()
        (model.double()(images) * upstream).sum().backward()
        (reference.double()(images) * upstream).sum().backward()
        theirs = {k: p.grad for k, p in reference.named_parameters() if p.grad is not None}
        theirs = layout.convert(theirs) if layout else theirs
        for key, parameter in model.named_parameters():
            difference = (parameter.grad - theirs[key].reshape(parameter.shape)).abs().max()
            assert difference <= 1e-7 * theirs[key].abs().max() + 1e-9, key

    return check


@pytest.fixture(scope="module")
def build(randomise):
    """A model of its own for each test, in eval mode, with all that learns drawn at random."""
    built = {}

    def get(name):
        if name not in built:
            built.clear()
            built[name] = randomise(build_backbone(name))
        return copy.deepcopy(built[name])

    return get


@pytest.fixture(scope="session")
def assert_epsilons_equal():
    """Every norm has the epsilon of the reference's, which random activations are too large to show."""

    def check(model, reference, layout=None):
        ours = {f"{key}.": module.eps for key, module in model.named_modules() if hasattr(module, "eps")}
        theirs = {f"{key}.": module.eps for key, module in reference.named_modules() if hasattr(module, "eps")}
        assert ours == (layout.convert(theirs) if layout else theirs)
        assert ours

    return check
