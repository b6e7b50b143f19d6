"""What was found in images, as files that pycocotools' `COCO.loadRes` takes."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backbones.errors import InputError

from ..files import write_json


@dataclass(frozen=True)
class CocoIds:
    """What images and categories are called in COCO's files.

    images: ids by file name. categories: ids by label.
    """

    images: Mapping[str, int]
    categories: Mapping[int, int]

    @classmethod
    def read(cls, file: Path, class_names: Sequence[str]) -> "CocoIds":
        """The ids of a file of annotations.

        Raises:
            InputError: it is not in COCO's format, or lacks a class of the model
        """
        try:
            content = json.loads(file.read_bytes())
            images = {str(entry["file_name"]): int(entry["id"]) for entry in content["images"]}
            names = {str(entry["name"]): int(entry["id"]) for entry in content["categories"]}
        except OSError as error:
            raise InputError(f"--annotations={file}: {error.strerror}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"--annotations={file}: is not in COCO's format: {error!r}") from error
        missing = [name for name in class_names[1:] if name not in names]
        if missing:
            raise InputError(
                f"--annotations={file}: has no category {', '.join(missing)}, which the model finds; it has "
                f"{', '.join(names)}"
            )
        return cls(images, {label: names[name] for label, name in enumerate(class_names) if label})

    def image(self, name: str) -> int | None:
        """The id of an image by its path below the folder, or else by its name, where that is listed once."""
        if name in self.images:
            return self.images[name]
        bases = Counter(Path(listed).name for listed in self.images)
        base = Path(name).name
        if bases[base] != 1:
            return None
        return next(number for listed, number in self.images.items() if Path(listed).name == base)


def save_coco(
    folder: Path, results: Mapping[str, Any], class_names: Sequence[str], annotations: Path | None = None
) -> list[Path]:
    """Write `results_box.json`, `results_mask.json` if there are masks, and, with ids of our own, `images.json`.

    Boxes and masks have files of their own, because from a common one pycocotools takes the areas of the boxes.

    Args:
        folder: where to.
        results: of each image, by its name: "size" (H, W), and "objects" of label, score, bbox and segmentation.
        class_names: by label; the first is the background.
        annotations: a file whose ids are taken; images that it does not list are left out, and told.
    """
    if annotations is None:
        ids = CocoIds(
            {name: number for number, name in enumerate(results, start=1)},
            {label: label for label in range(1, len(class_names))},
        )
    else:
        ids = CocoIds.read(annotations, class_names)
    numbers = {name: ids.image(name) for name in results}
    entries = [
        {"image_id": numbers[name], "category_id": ids.categories[found["label"]], **found}
        for name, result in results.items()
        for found in result["objects"]
        if numbers[name] is not None
    ]
    unlisted = [name for name, number in numbers.items() if number is None]
    if unlisted:
        print(f"{annotations} does not list {len(unlisted)} of the images, {unlisted[0]} among them: not in {folder}")
    contents: dict[str, Any] = {"results_box": _without(entries, "label", "segmentation")}
    if any("segmentation" in entry for entry in entries):
        contents["results_mask"] = _without(entries, "label", "bbox")
    if annotations is None:
        images = [
            {"id": numbers[name], "file_name": name, "height": result["size"][0], "width": result["size"][1]}
            for name, result in results.items()
        ]
        categories = [{"id": number, "name": class_names[label]} for label, number in ids.categories.items()]
        contents["images"] = {"images": images, "annotations": [], "categories": categories}
    folder.mkdir(exist_ok=True, parents=True)
    for name, content in contents.items():
        write_json(folder / f"{name}.json", content)
    return [folder / f"{name}.json" for name in contents]


def _without(entries: Sequence[Mapping[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in entry.items() if key not in names} for entry in entries]
