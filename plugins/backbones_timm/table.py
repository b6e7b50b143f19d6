"""What was measured of timm's models, read without importing timm or torch."""

import csv
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from backbones import Weights

FOLDER = Path(__file__).parent


class Level(NamedTuple):
    """One of the maps that timm's `forward_intermediates` returns."""

    index: int
    channels: int
    stride: int


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a model's features are, as measured.

    Args:
        name: timm's name of the model.
        module: timm's module that has it.
        params: parameters of the classifier, in millions.
        channels: widths of the pyramid's levels at strides 4, 8, 16 and 32.
        levels: the maps that the pyramid is made of, finest first.
        blocks: number of maps, where all have one stride; 0 where strides differ.
        divisor: image sides are zero-padded to a multiple of this; 1 where any size will do.
        minimum: and to this many pixels at least.
        side: (height, width) of the only images that the model takes; smaller ones are padded to it.
        options: what timm is asked for beside the name.
        output_strides: strides of the whole network that timm can build.
        pad_convolutions: whether convolutions without padding get one, so that no border is lost.
        unused: parameters that the maps do not depend on.
        refused: why the model cannot keep the promise; empty if it can.
    """

    name: str
    module: str
    params: float
    channels: tuple[int, ...] = ()
    levels: tuple[Level, ...] = ()
    blocks: int = 0
    divisor: int = 1
    minimum: int = 1
    side: tuple[int, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    output_strides: tuple[int, ...] = (32,)
    pad_convolutions: bool = False
    unused: tuple[str, ...] = ()
    refused: str = ""

    @property
    def sizes(self) -> str:
        """How images of any size are met, in words."""
        if self.refused:
            return f"refused: {self.refused}"
        if self.side:
            return f"images up to {self.side[0]} x {self.side[1]}, or img_size, padded to it"
        if self.divisor > 1:
            return f"any size, padded to multiples of {self.divisor}"
        return "any size"


@cache
def models() -> dict[str, Facts]:
    """Every model in the table, by name."""
    with open(FOLDER / "models.csv", newline="", encoding="utf-8") as file:
        next(file)
        return {row["name"]: _facts(row) for row in csv.DictReader(file)}


def names() -> list[str]:
    """Of every model in the table; reads nothing else of it."""
    with open(FOLDER / "models.csv", encoding="utf-8") as file:
        return [line.partition(",")[0] for line in file][2:]


@cache
def measured_with() -> str:
    """Version of timm whose models are in the table."""
    with open(FOLDER / "models.csv", encoding="utf-8") as file:
        return file.readline().split()[-1]


def weights(name: str) -> tuple[Weights, ...]:
    """Published weights of a model, timm's default first, each with the names that once meant it."""
    rows = [_weights(row) for row in _weight_rows().get(name, ())]
    tags = [{row.tag, *([""] if n == 0 else [])} for n, row in enumerate(rows)]
    former = _former_names().get(name, {})
    aliases = (tuple(a for tag in each for a in former.get(tag, ())) for each in tags)
    return tuple(replace(row, aliases=names) if names else row for row, names in zip(rows, aliases, strict=True))


@cache
def former() -> dict[str, tuple[str, str]]:
    """Of names that timm has given up, the model and the tag of the weights that each now is; no tag is the default."""
    with open(FOLDER / "former.csv", newline="", encoding="utf-8") as file:
        return {row["former"]: tuple(row["name"].partition(".")[::2]) for row in csv.DictReader(file)}


@cache
def _former_names() -> dict[str, dict[str, list[str]]]:
    """Names that timm has given up, by model and tag."""
    names: dict[str, dict[str, list[str]]] = {}
    for each, (model, tag) in former().items():
        names.setdefault(model, {}).setdefault(tag, []).append(each)
    return names


def is_users(name: str) -> bool:
    """Whether a model of this name was registered with timm by somebody else; never where timm is not imported yet."""
    models = sys.modules.get("timm.models")
    if models is None or not models.is_model(name):
        return False
    return not models.model_entrypoint(name).__module__.startswith("timm.")


def write_models(rows: Iterable[Facts], version: str, path: Path = FOLDER / "models.csv") -> None:
    """Writes the table that `models` reads; `version` is that of timm."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        file.write(f"# measured with timm {version}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(f.name for f in fields(Facts))
        writer.writerows([_text(getattr(row, f.name)) for f in fields(Facts)] for row in rows)


def write_former(rows: Mapping[str, str], path: Path = FOLDER / "former.csv") -> None:
    """Writes the table that `former` reads."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("former", "name"))
        writer.writerows(rows.items())


def write_weights(rows: Mapping[str, Iterable[Weights]], path: Path = FOLDER / "weights.csv") -> None:
    """Writes the table that `weights` reads."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_WEIGHT_COLUMNS)
        for name, published in rows.items():
            for row in published:
                values = (getattr(row, column) for column in _WEIGHT_COLUMNS[1:])
                writer.writerow([name, *map(_text, values)])


_WEIGHT_COLUMNS = ("name", "tag", "source", "input_size", "mean", "std", "interpolation", "license", "classes")


@cache
def _weight_rows() -> dict[str, list[dict[str, str]]]:
    rows: dict[str, list[dict[str, str]]] = {}
    with open(FOLDER / "weights.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            rows.setdefault(row.pop("name"), []).append(row)
    return rows


def _weights(row: dict[str, str]) -> Weights:
    numbers = {"input_size": _integers(row["input_size"])}
    numbers |= {key: tuple(map(float, row[key].split())) for key in ("mean", "std")}
    numbers["classes"] = int(row["classes"])
    return Weights(**(row | numbers))


def _facts(row: dict[str, str]) -> Facts:
    return Facts(
        name=row["name"],
        module=row["module"],
        params=float(row["params"]),
        channels=_integers(row["channels"]),
        levels=tuple(Level(*map(int, level.split(":"))) for level in row["levels"].split()),
        blocks=int(row["blocks"]),
        divisor=int(row["divisor"]),
        minimum=int(row["minimum"]),
        side=_integers(row["side"]),
        options={key: value == "True" for key, value in (o.split("=") for o in row["options"].split())},
        output_strides=_integers(row["output_strides"]),
        pad_convolutions=row["pad_convolutions"] == "True",
        unused=tuple(row["unused"].split()),
        refused=row["refused"],
    )


def _integers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split()))


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{k}={v}" for k, v in value.items())
    if isinstance(value, Level):
        return ":".join(map(str, value))
    return " ".join(map(_text, value)) if isinstance(value, tuple) else str(value)
