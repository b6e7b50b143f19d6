"""`backbones share CKPT`: a trained model into a folder or onto the Hugging Face Hub."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from backbones.errors import InputError

from ..models.base import HoldsBackbone
from ..models.saving import push_to_hub, save_pretrained
from ..training.tasks import load_model


def share(
    checkpoint: str | os.PathLike,
    out: str | os.PathLike | None = None,
    *,
    push: str | None = None,
    private: bool | None = None,
    card_name: str | None = None,
) -> HoldsBackbone:
    """Save the trained model in a checkpoint of `backbones fit` into a folder, upload it, or both.

    The card tells the data, the metrics and the recipe, as the checkpoint and the run folder around it have them.

    Args:
        checkpoint: such as `runs/segmentation-001/checkpoints/best.ckpt`.
        out: folder to write, see `save_pretrained`.
        push: repository to upload to, see `push_to_hub`.
        private: whether the repository is, where it is made.
        card_name: what the card says to load; by default the repository's name, or else the folder's.

    Returns:
        The model.

    Raises:
        WeightsError: there is no such checkpoint, or it is not one of a run.
        InputError: neither `out` nor `push` is given, or the model was built of what a file cannot hold.
    """
    if out is None and push is None:
        raise InputError("say where to: a folder, by --out DIR, a repository of the hub, by --push ID, or both")
    model = load_model(Path(checkpoint))
    if out is not None:
        save_pretrained(model, out, name=card_name or push)
    if push is not None:
        push_to_hub(model, push, private=private)
    return model


def command(argv: Sequence[str]) -> int:
    """`backbones share CKPT --out DIR | --push ID`."""
    parser = argparse.ArgumentParser(
        prog="backbones share",
        description="Save the trained model in a checkpoint for others: config.json, model.safetensors and a model "
        "card, in a folder, on the Hugging Face Hub, or both. backbones_tasks.from_pretrained loads it again.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="of `backbones fit`, such as .../best.ckpt")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--push", metavar="ID", help="repository of the hub to upload to; made if need be")
    parser.add_argument("--private", action="store_true", default=None, help="make that repository private")
    args = parser.parse_args(list(argv))
    model = share(args.checkpoint, args.out, push=args.push, private=args.private)
    metrics = ", ".join(f"{name} {value:.3f}" for name, value in model.metadata.get("metrics", {}).items())
    print(f"{model.task} on {model.inner_backbone.canonical_name}{': ' if metrics else ''}{metrics}")
    for where in filter(None, (args.out, args.push)):
        print(f"saved: backbones_tasks.from_pretrained({str(where)!r})")
    return 0
