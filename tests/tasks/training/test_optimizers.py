"""Optimizers: every one of timm's steps, lookahead and second-order ones resume, and factors to single rates."""

import pytest
import torch
from run_files import rows, same, weights
from timm.optim import list_optimizers
from torch import nn

from backbones import build_backbone
from backbones.cli import main
from backbones.errors import InputError
from backbones_tasks.training.optimizers import check_optimizer, make_optimizer
from backbones_tasks.training.segmentation import SegmentationTask

pytestmark = pytest.mark.usefixtures("workplace")

SMALL = ["--data.shapes.size=32", "--data.shapes.train=8", "--data.shapes.val=2", "--data.batch_size=2"]
SMALL += ["--model.decoder_options={decoder_channels: 8}", "--trainer.accelerator=cpu"]
SMALL += ["--trainer.enable_progress_bar=false"]


def fit(*options):
    return main(["fit", "segmentation", *SMALL, *options])


def told(optimizer, **own):
    return {"optimizer": optimizer, "optimizer_options": own, "lr": 0.01, "weight_decay": 0.05}


def test_a_name_is_an_optimizer_of_timms_with_or_without_lookahead():
    for name in list_optimizers(exclude_filters="bnb*"):  # which want a GPU to exist, and say so
        check_optimizer(told(name))
    check_optimizer(told("lookahead_adamw", lookahead_k=3, lookahead_alpha=0.8, betas=[0.8, 0.9]))
    for wrong, message in {
        "lookahead_adamwx": "did you mean 'adamw'",
        "ahead_adamw": "each also after 'lookahead_'",
        "lookahead_": "is unknown",
    }.items():
        with pytest.raises(InputError, match=message):
            check_optimizer(told(wrong))
    for name, own in (("adamw", {"lookahead_k": 3}), ("lookahead_adamw", {"lookahead_k": 0})):
        with pytest.raises(InputError, match="lookahead"):
            check_optimizer(told(name, **own))


def small_task(**options):
    return SegmentationTask("mobilevit_xxs", decoder_options={"decoder_channels": 8}, **options)


def test_lookahead_goes_back_every_k_steps_in_all_groups():
    """Groups that factors split off, too."""
    task = small_task(optimizer="lookahead_sgd", optimizer_options={"lookahead_k": 2}, backbone_lr=0.1, lr=0.1)
    plain = small_task(optimizer="sgd", backbone_lr=0.1, lr=0.1)
    plain.load_state_dict(task.state_dict())
    optimizers = task.make_optimizer(), plain.make_optimizer()
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    seen = []
    for _ in range(4):
        for each, optimizer in zip((task, plain), optimizers, strict=True):
            for parameter in each.model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        seen.append([p.detach().clone() for p in task.model.parameters()])
        ours, theirs = (torch.cat([p.flatten() for p in each.model.parameters()]) for each in (task, plain))
        assert torch.equal(ours, theirs) == (len(seen) < 4), "half of the way back after the second time"
    for (name, old), *steps in zip(before.items(), *seen, strict=True):
        assert all(not torch.equal(old, new) for new in steps), name


@pytest.mark.parametrize("optimizer", ["lookahead_adamw", "adahessian"])
def test_a_run_that_is_gone_on_with_equals_a_whole_one(optimizer, monkeypatch):
    options = ["--backbone={name: timm/test_vit, drop_path_rate: 0.1}", f"--model.optimizer={optimizer}"]
    options += ["--trainer.max_epochs=2"]
    cut = [*options, "--trainer.limit_train_batches=3"]  # lookahead is in the middle of its six steps
    step = SegmentationTask.training_step
    assert fit(*cut, "--out=whole") == 0
    monkeypatch.delenv("BACKBONES_RUN")

    def breaks_off(self, batch, index):
        if (self.current_epoch, index) == (1, 1):
            raise RuntimeError("power cut")
        return step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(SegmentationTask, "training_step", breaks_off)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(*cut, "--out=broken")
    assert main(["fit", "segmentation", "--out=broken", "--ckpt_path=last"]) == 0
    assert rows("whole") == rows("broken")
    assert same(weights("whole"), weights("broken"))


def test_adahessian_follows_the_diagonal_of_the_hessian():
    """Of a quadratic, the Hessian is known: the step is the gradient by its own curvature."""
    model = nn.Linear(3, 1, bias=False)
    curvature = torch.tensor([[1.0, 4.0, 16.0]])
    options = {**told("adahessian", betas=[0.0, 0.0]), "lr": 0.5, "weight_decay": 0.0, "layer_decay": 1.0}
    model.backbone_parameters = list
    optimizer = make_optimizer(model, options | {"backbone_lr": 1.0, "lr_multipliers": {}, "seed": 0})
    before = model.weight.detach().clone()
    (0.5 * curvature * model.weight**2).sum().backward(create_graph=True)
    optimizer.step()
    assert torch.allclose(model.weight, before / 2, atol=1e-5), "Newton's step, half of it"


def test_a_model_without_second_derivatives_is_told_of(capsys):
    detector = ["--backbone=timm/test_resnet", "--data.shapes.size=64", "--data.shapes.train=2", "--data.shapes.val=1"]
    detector += ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--data.batch_size=2"]
    assert main(["fit", "detection", *detector, "--model.optimizer=adahessian", "--out=run"]) == 2
    message = capsys.readouterr().err
    assert "needs second derivatives" in message
    assert "roi_align" in message


# Factors to single rates


def test_factors_multiply_rates_of_what_patterns_find():
    multipliers = {
        "pos_embed": 0.1,
        r"patch_embed|cls_token": 0.5,
        r"^backbone\.blocks\.(0|1)\.": 2.0,
        "backbone.blocks.0": 3.0,
    }
    options = {"layer_decay": 0.5, "backbone_lr": 0.1, "lr": 1.0, "decoder_options": {"decoder_channels": 8}}
    plain = SegmentationTask("vit_tiny_patch16", **options)
    task = SegmentationTask("vit_tiny_patch16", lr_multipliers=multipliers, **options)

    def rates(task):
        names = {p: name for name, p in task.model.named_parameters()}
        groups = task.make_optimizer().param_groups
        return {names[p]: g["lr"] * g["lr_scale"] for g in groups for p in g["params"]}

    before, after = rates(plain), rates(task)
    assert before.keys() == after.keys() == {name for name, _ in task.model.named_parameters()}
    factors = {"pos_embed": 0.1, "patch_embed": 0.5, "cls_token": 0.5}
    factors |= {"backbone.blocks.0.": 6.0, "backbone.blocks.1.": 2.0}
    for name, rate in before.items():
        factor = next((f for part, f in factors.items() if part in name), 1.0)
        assert after[name] == pytest.approx(rate * factor), name


@pytest.mark.parametrize(
    ("multipliers", "message"),
    [
        ("{pos_embd: 0.1}", "'pos_embd' is in the name of no parameter"),
        ("{pos_embed: -0.1}", "must be at least 0"),
        ("{'(pos': 0.1}", "no regular expression"),
    ],
)
def test_patterns_that_cannot_work_are_refused(multipliers, message, capsys):
    assert fit("--backbone=vit_tiny_patch16", f"--model.lr_multipliers={multipliers}", "--out=run") == 2
    assert message in capsys.readouterr().err


def test_the_rates_of_every_family_can_be_told_by_the_names_of_its_parameters():
    for name in ("swin_tiny", "pvt_v2_b0", "mobilevit_xxs"):
        names = [n for n, _ in build_backbone(name).named_parameters()]
        task = SegmentationTask(name, decoder_options={"decoder_channels": 8}, lr_multipliers={names[0]: 0.5})
        (slow,) = [g for g in task.make_optimizer().param_groups if g.get("lr_scale", 1.0) == 0.5]
        assert slow["params"] == [dict(task.model.named_parameters())[f"backbone.{names[0]}"]]
