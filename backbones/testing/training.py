"""What training asks for: gradients, freezing, stochastic depth, checkpointing, layer-wise lr decay."""

import copy

import torch
from timm.layers import DropPath
from timm.optim import create_optimizer_v2
from torch import nn

from .common import Build, disturb, loss_of, parameters_of, random_images, require, require_close, seeded, some


def check_drop_path(build: Build) -> None:
    """Drop path rises with depth, does not depend on what is pruned, and is off in eval mode."""
    model = build(drop_path_rate=0.5).eval()
    images = torch.randn(8, model.in_chans, 64, 64)  # so many that chance will not make two calls equal
    with torch.no_grad():
        for a, b in zip(model(images), model(images), strict=True):
            require(
                torch.equal(a, b),
                "with drop_path_rate=0.5, two calls in eval mode differ",
                "drop paths only where self.training is true, as timm.layers.DropPath does",
            )
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    require(rates == sorted(rates), f"drop path rates do not ascend: {rates}", "use Backbone.drop_path_rates")
    part = build(drop_path_rate=0.5, out_indices=(0,))
    pruned = [m.drop_prob for m in part.modules() if isinstance(m, DropPath)]
    require(
        pruned == rates[: len(pruned)],
        f"with out_indices=(0,) drop path rates change from {rates} to {pruned}",
        "compute them from the whole depth, with Backbone.drop_path_rates",
    )


def check_gradients(build: Build) -> None:
    """Gradients of the maps reach every parameter that learns."""
    model = build()
    disturb(model)  # branches whose last norm starts at zero let no gradient through at first
    loss_of(model, random_images(model, 70, 90)).backward()
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    # A bias may have none for a reason: one that shifts all logits of a softmax alike changes nothing.
    missing = [n for n, p in learning.items() if p.grad is None or (p.ndim > 1 and not p.grad.any())]
    require(
        not missing,
        f"{len(missing)} of {len(learning)} parameters get no gradient: {some(missing)}",
        "build no part that the maps do not use: distributed training waits for its gradient",
    )


def check_frozen_stages(build: Build) -> None:
    """What `frozen_stages` freezes neither learns nor drifts, and the rest learns."""
    for frozen in (0, 1):
        model = build(frozen_stages=frozen, drop_path_rate=0.1)
        parts = [part for group in model.freezable()[: frozen + 1] for part in group]
        held = {id(p) for part in parts for p in parameters_of(part)}
        names = {n for n, p in model.named_parameters() if id(p) in held}
        names |= {
            f"{n}.{b}"
            for n, m in model.named_modules()
            if any(m is inner for part in parts if isinstance(part, nn.Module) for inner in part.modules())
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
            "let freezable() name the modules that hold them, and keep no statistics outside of them",
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
    require(not moved, f"norm_eval=True, and these statistics moved: {some(moved)}", "override train() only to extend")


def check_checkpointing(build: Build) -> None:
    """Activation checkpointing changes no gradient and no statistic."""
    gradients, buffers = [], []
    for checkpointing in (False, True):
        model = build(checkpointing=checkpointing, drop_path_rate=0.2)
        with seeded(1):
            loss_of(model, torch.randn(2, model.in_chans, 64, 64)).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        buffers.append({n: b.double() for n, b in model.named_buffers()})
    lost = gradients[0].keys() - gradients[1].keys()
    require(not lost, f"with checkpointing=True, there is no gradient of {some(lost)}", "")
    for name, gradient in gradients[0].items():
        what = f"with checkpointing=True, the gradient of {name} differs"
        require_close(gradients[1][name], gradient, what, tolerance=1e-4)
    moved = [n for n, b in buffers[0].items() if not torch.allclose(b, buffers[1][n], rtol=1e-4, atol=1e-6)]
    require(
        not moved,
        f"after one step with checkpointing=True, {len(moved)} buffers differ from those without: {some(moved)}",
        "recompute by backbones.layers.Blocks or backbones.layers.checkpoint, which hold the statistics of batch norms "
        "still in the second pass",
    )


def check_layer_decay(build: Build) -> None:
    """timm's layer-wise lr decay covers each parameter once, lowest in the stem; norms and biases do not decay."""
    model = build()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = [(names[id(p)], group) for group in optimizer.param_groups for p in group["params"]]
    require(
        sorted(n for n, _ in groups) == sorted(names.values()),
        f"{len(names)} parameters are in {len(groups)} places of the optimizer",
        "let group_matcher()'s expressions match each parameter's name",
    )
    scale = {n: group["lr_scale"] for n, group in groups}
    stem = {names[id(p)] for part in model.freezable()[0] for p in parameters_of(part)}
    if stem and len(model.freezable()) > 1:
        require(
            {scale[n] for n in stem} == {min(scale.values())} and len(set(scale.values())) > 2,
            f"the stem's lr scales are {sorted({scale[n] for n in stem})}, all scales {sorted(set(scale.values()))}",
            "let group_matcher() sort the stem first and the blocks in the order in which they run",
        )
    decaying = [n for n, group in groups if group["weight_decay"] and n.endswith("bias")]
    require(not decaying, f"weight decay on {some(decaying)}", "name such parameters in no_weight_decay()")
