"""That a backbone is a module like any other: whoever writes its parameters, hooks or replaces its parts, is right."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ..backbone import Backbone
from ..errors import InputError
from ..inference import for_inference
from .common import Build, Skipped, fail, hooked, loss_of, random_images, require, require_close, some


def check_contiguous(build: Build) -> None:
    """Parameters and buffers are contiguous, as files, flattening and pruning expect."""
    model = build()
    strided = [n for n, t in model.state_dict(keep_vars=True).items() if not t.is_contiguous()]
    require(
        not strided,
        f"{len(strided)} of {len(model.state_dict())} parameters and buffers are not contiguous: {some(strided)}",
        "take .to(memory_format=torch.channels_last) and views that are kept as parameters out of the constructor; "
        "whoever wants another format asks for it",
    )


def check_every_module_is_called(build: Build) -> None:
    """Each layer that holds parameters runs through its `__call__`, in training and in eval mode.

    A module of several, such as the whole of another library's model, may be run part by part.
    """
    model = build()
    holding = {
        name: module
        for name, module in model.named_modules()
        if any(p.requires_grad for p in module.parameters(recurse=False))
    }
    images = random_images(model, 64, 64)
    for training, gradients in ((True, True), (False, True), (False, False)):
        called: set[str] = set()

        def note(name: str, _: list[Tensor], called: set[str] = called) -> None:
            called.add(name)

        with hooked(holding, note), torch.set_grad_enabled(gradients):
            model.train(training)(images)
        silent = {n for n in holding if n not in called and not any(c.startswith(f"{n}.") for c in called)}
        require(
            not silent,
            f"in {_mode(training, gradients)}, {len(silent)} of {len(holding)} modules that hold parameters never ran: "
            f"{some(silent)}",
            "call the module, and do not hand its weight to torch.nn.functional: hooks, LoRA, quantisation, pruning "
            "and FLOP counters see calls only",
        )


def check_hooks(build: Build) -> None:
    """What a forward hook was given is not overwritten afterwards."""
    model = build()
    images = random_images(model, 64, 64)
    for training, gradients in ((False, False), (False, True), (True, True)):
        seen: list[tuple[str, Tensor, Tensor]] = []

        def keep(name: str, values: list[Tensor], seen: list[Any] = seen) -> None:
            seen.extend((name, value.detach(), value.detach().clone()) for value in values)

        with hooked(dict(model.named_modules()), keep), torch.set_grad_enabled(gradients):
            model.train(training)(images)
        written = {name for name, value, was in seen if not torch.equal(value, was)}
        require(
            not written,
            f"in {_mode(training, gradients)}, what hooks on {len(written)} modules were given was overwritten later: "
            f"{some(written)}",
            "write in place to nothing that a module takes or returns: x = x + y in place of x += y, and nn.ReLU() "
            "without inplace=True",
        )


def check_written_parameters(build: Build) -> None:
    """In eval mode, maps follow the parameters and buffers, whoever wrote them and how."""
    model, fresh = build().eval(), build().eval()
    images = random_images(model, 64, 48)
    for how, write in _WRITERS.items():
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                model(images)  # what is kept between calls is kept now
        write(model)
        same = copy.deepcopy(fresh)
        same.load_state_dict(model.state_dict())
        with torch.no_grad():
            pairs = zip(model.out_indices, model(images), same(images), strict=True)
        # Not to the bit: where in memory a parameter lies decides by which instructions it is read.
        stale = [i for i, a, b in pairs if (a - b).abs().max() > 1e-4 * b.abs().max()]
        require(
            not stale,
            f"after {how}, maps {stale} differ from those of a fresh model with the same state",
            "keep nothing between calls that is computed from parameters: a write to .data, which no version counter "
            "tells, makes it stale. backbones.for_inference may keep it",
        )


def check_frozen_norms(build: Build) -> None:
    """Batch norms may be replaced by frozen ones of any library, which share no attribute with them."""
    model = build()
    with torch.no_grad():
        model(random_images(model, 64, 64))  # statistics move
    images = random_images(model, 64, 64)
    names = [n for n, m in model.named_modules() if type(m) is nn.BatchNorm2d]
    if not names:
        raise Skipped("it has no BatchNorm2d")
    frozen = copy.deepcopy(model)
    for name in names:
        frozen.set_submodule(name, _Frozen(frozen.get_submodule(name)))
    frozen.train()(images)  # what it gives is drawn at random where there is dropout
    with torch.no_grad():
        for a, b in zip(frozen.eval()(images), model.eval()(images), strict=True):
            require_close(
                a,
                b,
                f"with frozen batch norms in place of {len(names)}, a map differs",
                "call norms, and read none of their attributes",
                tolerance=1e-4,
            )


def check_for_inference(build: Build) -> None:
    """`for_inference` gives the same maps within 1e-4 by a model that cannot be trained, and leaves this one alone."""
    model = build()
    with torch.no_grad():
        model(random_images(model, 64, 64))  # statistics move
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learning = [p.requires_grad for p in model.parameters()]
    fast = for_inference(model)
    try:
        fast.train()
    except InputError:
        pass
    else:
        fail("train() of what for_inference returns should be refused, and was not", "override train() only to extend")
    images = [random_images(model, *size) for size in ((64, 64), (97, 50), (64, 64))]
    with torch.no_grad():
        quick = [fast(batch) for batch in images]
        changed = [n for n, value in model.state_dict().items() if not torch.equal(value, before[n])]
        changed += [] if model.training and learning == [p.requires_grad for p in model.parameters()] else ["its mode"]
        require(
            not changed,
            f"for_inference changed the model that it was given: {some(changed)}",
            "let prepare_for_inference return something new, and write to nothing that it is given",
        )
        model.eval()
        for batch, maps in zip(images, quick, strict=True):
            for a, b in zip(maps, model(batch), strict=True):
                what = f"images of {tuple(batch.shape)}: a map of for_inference differs"
                require_close(a, b, what, "correct the prepare_for_inference of its layers", tolerance=1e-4)


# --- small things -------------------------------------------------------------------------------------------


def _mode(training: bool, gradients: bool) -> str:
    return ("training" if training else "eval") + " mode" + ("" if gradients else " under no_grad")


class _Frozen(nn.Module):
    """A batch norm as a scale and a shift, and nothing else."""

    def __init__(self, norm: Any):
        super().__init__()
        scale = (norm.running_var + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight.detach()
        shift = -norm.running_mean * scale
        shift = shift if norm.bias is None else shift + norm.bias.detach()
        self.scale, self.shift = nn.Buffer(scale[:, None, None]), nn.Buffer(shift[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def _floats(model: nn.Module) -> Iterable[Tensor]:
    return (t for t in model.state_dict(keep_vars=True).values() if t.is_floating_point())


def _write_data(model: Backbone) -> None:
    for t in _floats(model):
        t.data.mul_(0.9).add_(0.01)


def _assign_data(model: Backbone) -> None:
    for t in _floats(model):
        t.data = t.data * 0.9 + 0.01


def _write_in_place(model: Backbone) -> None:
    with torch.no_grad():
        for t in _floats(model):
            t.mul_(0.9).add_(0.01)


def _write_through_numpy(model: Backbone) -> None:
    for t in _floats(model):
        values = t.detach().numpy()
        values *= 0.9


def _write_flat(model: Backbone) -> None:
    vector_to_parameters(parameters_to_vector(model.parameters()).detach() * 0.9, model.parameters())


def _assign_state(model: Backbone) -> None:
    state = model.state_dict()
    model.load_state_dict({n: t * 0.9 if t.is_floating_point() else t for n, t in state.items()}, assign=True)


def _load_state(model: Backbone) -> None:
    model.load_state_dict({n: t * 0.9 if t.is_floating_point() else t for n, t in model.state_dict().items()})


def _train(model: Backbone) -> None:
    loss_of(model.train(), random_images(model, 64, 48)).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    model.eval().zero_grad()


_WRITERS: dict[str, Callable[[Backbone], None]] = {
    "p.data.mul_()": _write_data,
    "p.data = ...": _assign_data,
    "p.mul_() under no_grad": _write_in_place,
    "p.detach().numpy()": _write_through_numpy,
    "vector_to_parameters": _write_flat,
    "load_state_dict()": _load_state,
    "load_state_dict(assign=True)": _assign_state,
    "a step of training": _train,
}
