"""What training asks for: gradients, and parts that neither learn nor drift."""

import copy

import torch

from ..backbone import Backbone
from ..layers import has_statistics
from .common import Build, disturb, loss_of, owner_of, parameters_of, random_images, require, some, with_drop_path


def check_gradients(build: Build) -> None:
    """Everything learns unless `frozen_stages` says otherwise, and gradients of the maps reach all of it."""
    model = build()
    still = {n for n, p in model.named_parameters() if not p.requires_grad}
    model.requires_grad_(True)
    disturb(model)  # branches whose last norm starts at zero let no gradient through at first
    loss_of(model, random_images(model, 70, 90)).backward()
    # A bias may have none for a reason: one that shifts all logits of a softmax alike changes nothing.
    missing = {n for n, p in model.named_parameters() if p.grad is None or (p.ndim > 1 and not p.grad.any())}
    frozen = still - missing
    require(
        not frozen,
        f"{len(frozen)} parameters that the maps depend on are built with requires_grad=False: {some(frozen)}",
        "let frozen_stages freeze, which whoever trains asks for, and make a buffer of what never learns",
    )
    missing -= still
    require(
        not missing,
        f"{len(missing)} of {len(list(model.parameters())) - len(still)} parameters get no gradient: {some(missing)}",
        "build no part that the maps do not use: distributed training waits for its gradient",
    )


def check_frozen_stages(build: Build) -> None:
    """What `frozen_stages` freezes neither learns nor drifts, and the rest learns."""
    for frozen in (0, 1):
        model = with_drop_path(build, 0.1, frozen_stages=frozen)
        parts = [part for group in model.freezable()[: frozen + 1] for part in group]
        held = {id(p) for part in parts for p in parameters_of(part)}
        names = {n for n, p in model.named_parameters() if id(p) in held}
        names |= {
            f"{n}.{b}"
            for n, m in model.named_modules()
            if any(m is inner for part in parts if isinstance(part, torch.nn.Module) for inner in part.modules())
            for b, _ in m.named_buffers(recurse=False)
        }
        before = copy.deepcopy(model.state_dict())
        model.train()
        learning = [p for p in model.parameters() if p.requires_grad]
        require(
            bool(learning) and bool(held),
            f"frozen_stages={frozen} freezes {len(held)} parameters, and leaves {len(learning)}",
            "let freezable() return the stem, then one entry per stage",
        )
        loss_of(model, random_images(model, 64, 64)).backward()
        torch.optim.SGD(learning, lr=0.1).step()
        after = model.state_dict()
        moved = [n for n in names & after.keys() if not torch.equal(before[n], after[n])]
        require(
            not moved,
            f"frozen_stages={frozen} froze {len(names)} tensors, and {len(moved)} of them moved: {some(moved)}",
            _how_to_hold(model, moved, "let freezable() name the modules that hold them"),
        )
        others = [n for n, p in model.named_parameters() if p.requires_grad]
        require(
            any(not torch.equal(before[n], after[n]) for n in others),
            f"with frozen_stages={frozen} nothing learns",
            "let freezable() return the stem, then one entry per stage",
        )


def check_norm_eval(build: Build) -> None:
    """With `norm_eval`, BatchNorm statistics stay as they are in training."""
    model = build(norm_eval=True).train()
    before = {n: b.clone() for n, b in model.named_buffers()}
    with torch.no_grad():
        model(random_images(model, 64, 64))
    moved = [n for n, b in model.named_buffers() if not torch.equal(b, before[n])]
    require(
        not moved,
        f"norm_eval=True, and these statistics moved: {some(moved)}",
        _how_to_hold(model, moved, "hand norm_eval on to Backbone.__init__"),
    )


def _how_to_hold(model: Backbone, moved: list[str], otherwise: str) -> str:
    """How to keep buffers from moving, by what moves them."""
    owners = {owner_of(model, name) for name in moved}
    unknown = {type(owner).__name__ for owner in owners if not has_statistics(owner)}
    if unknown:
        return (
            f"let {some(unknown)}, which is not known for a batch norm, be a subclass of nn.BatchNorm2d, or call its "
            "statistics running_mean and running_var, and move them where self.training is true alone"
        )
    heedless = {type(owner).__name__ for owner in owners if not owner.training}
    if heedless:
        return f"let {some(heedless)} move statistics where self.training is true alone"
    return f"{otherwise}, and override train() only to extend it"
