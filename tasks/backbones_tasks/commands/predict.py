"""`backbones predict TASK`: a checkpoint and images in, pictures and results out."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from backbones import for_inference
from backbones.errors import InputError

from ..data.images import IMAGE_SUFFIXES, UnreadableImage
from ..training.tasks import find_task, load_task


def predict(argv: Sequence[str]) -> int:
    """Runs the command on TASK and its options; returns 0, or 1 if some images could not be read."""
    kind = find_task(argv[0])
    parser = argparse.ArgumentParser(prog=f"backbones predict {kind.name}", description=kind.predicts)
    parser.add_argument("--ckpt", required=True, type=Path, help="checkpoint of a run, such as checkpoints/best.ckpt")
    parser.add_argument("--images", required=True, type=Path, help="an image, or a folder with images in any depth")
    parser.add_argument("--out", required=True, type=Path, help="folder to write to")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    kind.add_predict_options(parser)
    args = parser.parse_args(argv[1:])

    sources = _find_images(args.images)  # before the model: a wrong path should not cost its loading
    task = load_task(args.ckpt, kind.name, args.device)
    task.model = for_inference(task.model, dtype=torch.bfloat16 if torch.device(args.device).type == "cuda" else None)
    args.out.mkdir(parents=True, exist_ok=True)
    unreadable, folders, results = {}, {}, {}
    for source, name in tqdm(sources, desc="predict", unit="image", disable=None):

        def place(folder: str, suffix: str, name: str = name) -> Path:
            path = args.out / folder / f"{name}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            folders[folder] = args.out / folder
            return path

        try:
            with torch.inference_mode():
                result = task.predict_file(source, place, args)
        except UnreadableImage as error:
            unreadable[source] = error
            continue
        if result is not None:
            results[source.relative_to(args.images).as_posix() if args.images.is_dir() else source.name] = result
    written = list(map(str, folders.values()))
    if results:
        file = args.out / "results.json"
        file.write_text(json.dumps({"classes": task.class_names, "images": results}, indent=1), encoding="utf-8")
        written.append(str(file))
    labelled = len(sources) - len(unreadable)
    print(f"{labelled} of {len(sources)} images labelled: {', '.join(written) or 'nothing written'}")
    for source, error in unreadable.items():
        print(f"not read: {source}: {error}", file=sys.stderr)
    return 1 if unreadable else 0


def _find_images(path: Path) -> list[tuple[Path, str]]:
    """Images below a path, each with a name, relative to it, for what is made of it."""
    if path.is_file():
        return [(path, path.stem)]
    if not path.is_dir():
        raise InputError(f"--images={path}: no such file or folder")
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise InputError(f"--images={path}: no images in it; these are read: {', '.join(sorted(IMAGE_SUFFIXES))}")
    stems = Counter(p.relative_to(path).with_suffix("") for p in found)
    names = [p.relative_to(path) for p in found]
    return [
        (p, str(n.with_suffix("") if stems[n.with_suffix("")] == 1 else n)) for p, n in zip(found, names, strict=True)
    ]
