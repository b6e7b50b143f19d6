"""`backbones predict TASK`: a checkpoint and images in, pictures and results out."""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from backbones import for_inference
from backbones.errors import InputError, MissingDependency

from ..data.images import IMAGE_SUFFIXES, UnreadableImage, find_files
from ..files import WriteError, write_json
from ..training.runs import terminable
from ..training.task import Task
from ..training.tasks import find_task, load_task

MANIFEST = "predict.json"  # in a folder that predict wrote; nothing else is written into or over
NAMES = "Results are named as the images are, without their suffix, or with it where two of them would share a name."


def predict(argv: Sequence[str]) -> int:
    """Runs the command on TASK and its options; returns 0, or 1 if some images could not be labelled."""
    kind = find_task(argv[0])
    parser = argparse.ArgumentParser(
        prog=f"backbones predict {kind.name}", description=kind.predicts, epilog=NAMES, allow_abbrev=False
    )
    parser.add_argument("--ckpt", required=True, type=Path, help="checkpoint of a run, such as checkpoints/best.ckpt")
    parser.add_argument("--images", required=True, type=Path, help="an image, or a folder with images in any depth")
    parser.add_argument("--out", required=True, type=Path, help="folder to write to: a new one, or one of predict's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    kind.add_predict_options(parser)
    args = parser.parse_args(argv[1:])

    sources = _find_images(args.images)  # before the model: a wrong path should not cost its loading
    out = Output(args.out, args.images)
    task = load_task(args.ckpt, kind.name, args.device)
    task.check_prediction(args)
    task.model = for_inference(task.model, dtype=torch.bfloat16 if torch.device(args.device).type == "cuda" else None)
    out.claim({"task": kind.name, "checkpoint": str(args.ckpt), "images": str(args.images)})
    results, failed = {}, []
    try:
        with terminable():
            for source, name in tqdm(sources, desc="predict", unit="image", disable=None):
                try:
                    with torch.inference_mode():
                        result = task.predict_file(source, out.placing(name), args)
                except (MissingDependency, WriteError, Foreign):  # no image will fare better
                    raise
                except UnreadableImage as error:
                    failed.append(f"not read: {source}: {error}")
                except Exception as error:  # of this image; the others are labelled all the same
                    failed.append(f"not labelled: {source}: {type(error).__name__}: {error}".replace("\n", " "))
                else:
                    key = source.relative_to(args.images).as_posix() if args.images.is_dir() else source.name
                    results[key] = result
    finally:  # what was done is kept, whatever ended it
        _conclude(task, out, results, args)
        print(f"{len(results)} of {len(sources)} images labelled: {', '.join(out.written) or 'nothing written'}")
        for line in failed:
            print(line, file=sys.stderr)
    return 1 if failed else 0


class Foreign(InputError):
    """What predict would write to is not its own."""


class Output:
    """The folder that results go to. Nothing is written over that predict did not write, and no link is followed.

    Args:
        folder: what --out says
        images: what is labelled

    Raises:
        Foreign: the folder holds the images, or lies among them, or something else is in it
    """

    def __init__(self, folder: Path, images: Path):
        self.folder, self.written = folder, []
        real, source = folder.resolve(), images.resolve()
        if source.is_relative_to(real):
            raise Foreign(
                f"--out={folder} holds the images themselves ({images}), beside which true masks may lie: {_NEW}"
            )
        if images.is_dir() and real.is_relative_to(source):
            raise Foreign(
                f"--out={folder} lies among the images ({images}), and would be labelled the next time: {_NEW}"
            )
        if folder.exists() and not folder.is_dir():
            raise Foreign(f"--out={folder} is no folder")
        there = sorted(folder.iterdir()) if folder.is_dir() else []
        if there and not (folder / MANIFEST).is_file():
            raise Foreign(f"--out={folder} holds {there[0].name}, which predict did not write: {_NEW}")
        for path in there:
            self._check(path)

    def claim(self, facts: dict[str, Any]) -> None:
        """Make the folder, and write what says that it is predict's."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WriteError(f"--out={self.folder} cannot be made: {error.strerror}") from error
        write_json(self.folder / MANIFEST, facts)

    def placing(self, name: str) -> Any:
        """The function of a folder and a suffix that says where what is made of an image goes."""

        def place(folder: str, suffix: str) -> Path:
            path = self.folder / folder / f"{name}{suffix}"
            for part in (path, *path.parents):
                if part == self.folder:
                    break
                self._check(part)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise WriteError(f"{path.parent} cannot be made: {error.strerror}") from error
            self.note(self.folder / folder)
            return path

        return place

    def note(self, path: Path) -> None:
        """Remember what was written, for people."""
        if str(path) not in self.written:
            self.written.append(str(path))

    @staticmethod
    def _check(path: Path) -> None:
        if path.is_symlink():
            raise Foreign(f"{path} is a link to {path.readlink()}, which predict would write over: {_NEW}")


_NEW = "choose a new folder for --out"


def _conclude(task: Task, out: Output, results: dict[str, Any], args: argparse.Namespace) -> None:
    """Write what is about all images."""
    results = {name: result for name, result in results.items() if result is not None}
    if not results:
        return
    listed = {name: task.listed(result, args) for name, result in results.items()}
    file = out.folder / "results.json"
    write_json(file, {"classes": task.class_names, "images": listed})
    out.note(file)
    for path in task.save_predictions(out.folder, results, args):
        out.note(path)


def _find_images(path: Path) -> list[tuple[Path, str]]:
    """Images below a path, each with a name of its own, relative to it, for what is made of it."""
    if path.is_file():
        return [(path, path.stem)]
    if not path.is_dir():
        raise InputError(f"--images={path}: no such file or folder")
    found = [file for file in find_files(path, IMAGE_SUFFIXES).files if not _is_ours(file, path)]
    if not found:
        raise InputError(f"--images={path}: no images in it; these are read: {', '.join(sorted(IMAGE_SUFFIXES))}")
    names = [file.relative_to(path) for file in found]
    # no file system that ignores case may take two names for one
    taken = Counter(key.casefold() for name in names for key in (str(name), str(name.with_suffix(""))))
    return [
        (file, str(name.with_suffix("") if taken[str(name.with_suffix("")).casefold()] == 1 else name))
        for file, name in zip(found, names, strict=True)
    ]


def _is_ours(file: Path, root: Path) -> bool:
    """Whether predict wrote it."""
    return any((root / folder / MANIFEST).is_file() for folder in file.relative_to(root).parents)
