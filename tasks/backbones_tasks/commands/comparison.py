"""`backbones compare TASK`: one recipe on several backbones, one after another, into one table and one picture."""

import csv
import json
import os
import re
import signal
import statistics
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from torch import nn

from backbones.cli.bench import Case, machine, measure
from backbones.cli.output import print_table
from backbones.errors import InputError

from ..files import is_checkpoint, whole
from ..pictures.tradeoff import save_tradeoff
from ..training.callbacks import read_metrics
from ..training.runs import HANDED_DOWN, read_checkpoint
from ..training.task import Task
from ..training.tasks import load_task
from .command_line import CommandLine, as_trained

SECONDS = 3.0  # how long each model is timed
TOGETHER = 8 * 2**30  # bytes of checkpoints, optimizers included, whose models are timed in turn, and else one by one


# of what is not a score: heading and digits in the table
_COLUMNS = {
    "params_m": ("params (M)", 2),
    "gmacs": ("GMACs", 2),
    "latency_ms": ("latency (ms)", 1),
    "peak_mb": ("memory (MB)", 0),
    "best_epoch": ("best epoch", 0),
    "epoch_s": ("s / epoch", 1),
    "training_mb": ("training memory (MB)", 0),
    "note": ("note", 0),
}


@dataclass
class Entry:
    """One backbone of a comparison.

    Args:
        label: what the table calls it.
        backbone: options of `build_backbone`, "name" among them.
        folder: name of its run folder.
        state: "waiting", also where training was interrupted, "finished" or "failed".
        error: why it failed.
        figures: what was measured of the trained model.
        options: of the recipe, by dotted key, that this backbone alone is trained with.
    """

    label: str
    backbone: dict[str, Any]
    folder: str
    state: str = "waiting"
    error: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


class Comparison:
    """A folder with a recipe, a run for each backbone, and what came out.

    Args:
        folder: of the comparison.
        task: class of the task.
        entries: the backbones.
    """

    def __init__(self, folder: Path, task: type[Task], entries: Iterable[Entry] = ()):
        self.folder, self.task, self.entries = folder, task, list(entries)

    @classmethod
    def read(cls, folder: Path, task: type[Task]) -> "Comparison":
        """What `save` wrote."""
        if not is_comparison(folder):
            raise InputError(f"{folder} holds no comparison")
        content = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
        if content["task"] != task.name:
            raise InputError(f"{folder} compares {content['task']}, not {task.name}")
        return cls(folder, task, [Entry(**entry) for entry in content["backbones"]])

    def save(self) -> None:
        content = {"task": self.task.name, "backbones": [asdict(entry) for entry in self.entries]}
        with whole(self.folder / "comparison.json") as file:
            file.write_text(json.dumps(content, indent=1), encoding="utf-8")

    def add(self, backbone: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        """Another backbone, unless it is there already; its label has options where a name alone would mislead."""
        if any((entry.backbone, entry.options) == (backbone, options) for entry in self.entries):
            return
        label = backbone["name"] + "".join(f" {key.partition('.')[2]}={value}" for key, value in options.items())
        if label in (entry.label for entry in self.entries):
            label += "".join(f" {key}={value}" for key, value in backbone.items() if key != "name")
        folder = plain = re.sub(r"[^\w.=-]+", "-", label)
        taken, number = {entry.folder for entry in self.entries}, 1
        while folder in taken:
            number += 1
            folder = f"{plain}-{number}"
        self.entries.append(Entry(label, dict(backbone), folder, options=dict(options)))

    def run(self, entry: Entry) -> Path:
        """The run folder of a backbone."""
        return self.folder / entry.folder

    def train(self) -> None:
        """Train what is not finished; a failure is recorded, and the next one comes."""
        for number, entry in enumerate(self.entries, 1):
            if entry.state == "finished":
                continue
            print(f"\n{entry.label} ({number} of {len(self.entries)})", flush=True)
            run = self.run(entry)
            if (run / "config.yaml").is_file():
                how = ["--ckpt_path", "last"]
            else:
                run.mkdir(exist_ok=True)
                how = ["--config", str(self.folder / "recipe.yaml"), "--model.backbone", json.dumps(entry.backbone)]
                how += arguments(entry.options)
            entry.error = _in_process(["fit", self.task.name, "--out", str(run), *how], run / "log.txt")
            entry.state = "failed" if entry.error else "finished"
            if entry.error:
                print(f"  failed, see {run / 'log.txt'}: {entry.error}", flush=True)
            entry.figures = {}
            self.save()
            self.write()

    def measure(self) -> None:
        """Measure all trained models, in turn if they fit into memory together: what else the machine does hits all."""
        trained = [entry for entry in self.entries if entry.state == "finished"]
        cases = [self._case(entry) for entry in trained]
        if all(entry.figures.get("machine") == machine(case) for entry, case in zip(trained, cases, strict=True)):
            return
        print(f"\nmeasuring: {machine(cases[0])}", flush=True)
        together = sum(_size(case.checkpoint) for case in cases) < TOGETHER
        turns = [cases] if together else [[case] for case in cases]
        results = [result for turn in turns for result in measure(turn, SECONDS * len(turn))]
        for entry, case, result in zip(trained, cases, results, strict=True):
            if result.error:
                entry.figures = {"error": f"not measured: {result.error}"}
                continue
            entry.figures = {name: getattr(result, name) for name in ("params_m", "gmacs", "latency_ms", "peak_mb")}
            entry.figures |= {"machine": machine(case), "scores": list(load_task(case.checkpoint, case.task).scores)}
        self.save()

    def _case(self, entry: Entry) -> "TrainedCase":
        """A trained model under the first validation image, the same one for all."""
        checkpoint = self.run(entry) / "checkpoints" / "best.ckpt"
        if not is_checkpoint(checkpoint):  # training ended before anything was measured
            checkpoint = checkpoint.with_name("last.ckpt")
        images = self.folder / "image.pt"
        recipe = yaml.safe_load((self.folder / "recipe.yaml").read_text(encoding="utf-8"))
        on_cpu = recipe["trainer"]["accelerator"] == "cpu" or not torch.cuda.is_available()
        if not images.is_file():
            with whole(images) as file:
                torch.save(_first_image(self.task, checkpoint), file)
        return TrainedCase(
            name=entry.label,
            size=tuple(torch.load(images, weights_only=True)[0].shape[-2:]),
            device="cpu" if on_cpu else "cuda",
            for_inference=True,
            task=self.task.name,
            checkpoint=checkpoint,
            images=images,
        )

    def rows(self) -> list[dict[str, Any]]:
        """What is known of each backbone, the best first."""
        rows = [self._row(entry) for entry in self.entries]
        return sorted(rows, key=lambda row: -row[self.task.metric] if row[self.task.metric] is not None else 1)

    def _row(self, entry: Entry) -> dict[str, Any]:
        epochs = read_metrics(self.run(entry) / "metrics.csv")
        scored = [epoch for epoch in epochs if epoch[self.task.metric]]
        finished = entry.state == "finished"
        best = max(scored, key=lambda epoch: float(epoch[self.task.metric])) if finished and scored else {}
        scores = entry.figures.get("scores", self.task.scores)
        notes = {
            "failed": entry.error,
            "waiting": f"not finished: {len(epochs)} epochs so far" if epochs else "not trained yet",
            "finished": "" if scored else "no score: training ended within its first epoch",
        }
        return {
            "backbone": entry.label,
            **{name: float(best[name]) if best.get(name) else None for name in scores},
            **{name: entry.figures.get(name) for name in ("params_m", "gmacs", "latency_ms", "peak_mb")},
            "best_epoch": int(best["epoch"]) + 1 if best else None,
            "epoch_s": statistics.median(float(epoch["seconds"]) for epoch in epochs) if finished and epochs else None,
            "training_mb": max(int(epoch["peak_memory_mb"]) for epoch in epochs) if finished and epochs else None,
            "note": notes[entry.state] or entry.figures.get("error", ""),
        }

    def report(self) -> None:
        """Write and print what is known."""
        header, cells = self.write()
        print()
        print_table(header, cells)
        files = [file for end in ("md", "csv", "png") if (file := self.folder / f"comparison.{end}").is_file()]
        print(f"\n{', '.join(map(str, files))}")

    def write(self) -> tuple[list[str], list[list[Any]]]:
        """Write comparison.csv, .md and .png; returns the table."""
        rows = self.rows()
        names = dict.fromkeys(name for row in rows for name in row)
        columns = [name for name in names if any(row.get(name) not in (None, "") for row in rows)]
        columns.sort(key=lambda name: list(_COLUMNS).index(name) if name in _COLUMNS else -1)
        with whole(self.folder / "comparison.csv") as file, file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        header = [_COLUMNS[name][0] if name in _COLUMNS else name for name in columns]
        cells = [[_cell(name, row.get(name)) for name in columns] for row in rows]
        lines = (header, ["---"] * len(header), *cells)
        table = "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines)
        where = sorted({entry.figures["machine"] for entry in self.entries if "machine" in entry.figures})
        with whole(self.folder / "comparison.md") as file:
            file.write_text(f"{table}\n\n{self._caption(where)}\n", encoding="utf-8")
        drawn = [row for row in rows if row[self.task.metric] is not None and row["latency_ms"]]
        if drawn:
            with whole(self.folder / "comparison.png") as file:
                save_tradeoff(
                    file,
                    *(
                        [row[name] for row in drawn]
                        for name in ("backbone", "latency_ms", self.task.metric, "params_m")
                    ),
                    score=self.task.metric,
                    caption=f"{self.task.name}, whole models; {'; '.join(where)}",
                )
        return header, cells

    def _caption(self, where: Sequence[str]) -> str:
        lines = [
            f"`backbones compare {self.task.name}`: scores of the epoch of the best {self.task.metric}, on the "
            "validation images; the recipe is in recipe.yaml."
        ]
        if where:
            lines.append(
                "Parameters, multiply-adds, latency and peak memory are those of the whole trained model, heads "
                f"included, for one validation image ({'; '.join(where)})."
            )
        return " ".join(lines)


@dataclass(frozen=True)
class TrainedCase(Case):
    """A trained model of a run, called with the images of a file.

    Args:
        task: name of the task.
        checkpoint: of the run.
        images: what a batch of the task has as its images, saved by torch.
    """

    counted_on: ClassVar[str] = "cpu"  # how much a detector computes depends on what it finds

    task: str
    checkpoint: Path
    images: Path

    def build(self, device: str | None = None) -> tuple[nn.Module, Any]:
        device = device or self.device
        images = torch.load(self.images, map_location=device, weights_only=True)
        return load_task(self.checkpoint, self.task, device), images

    def faster(self, model: nn.Module) -> nn.Module:
        model.model = super().faster(model.model)
        return model

    def strides(self, model: nn.Module) -> list[int]:
        return model.model.inner_backbone.feature_info.reduction()


def arguments(options: Mapping[str, Any]) -> list[str]:
    """Options by dotted key as the command line takes them."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items()]


def is_comparison(folder: Path) -> bool:
    return (folder / "comparison.json").is_file()


def _in_process(argv: list[str], log: Path) -> str:
    """Run `backbones ARGV` in a process of its own, and keep what it prints; returns why it failed, or ""."""
    environment = {key: value for key, value in os.environ.items() if key != HANDED_DOWN}
    environment |= {"PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}  # nothing in this folder is mistaken for a module
    printed: deque[str] = deque(maxlen=100)
    with (
        log.open("a", encoding="utf-8") as file,
        subprocess.Popen(
            [sys.executable, "-m", "backbones_tasks.commands.child", *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
        ) as process,
    ):
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                printed.append(line.rstrip())
                print(f"  {line}", end="", flush=True)
        except KeyboardInterrupt:
            try:
                process.wait(10)  # Ctrl-C reaches it, too
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    return _reason(process.returncode, printed)


def _reason(code: int, printed: Sequence[str]) -> str:
    """Why a process failed, in one line; empty if it did not."""
    if code == 0:
        return ""
    if code < 0:
        name = signal.Signals(-code).name
        return f"ended by {name}" + (", as where memory is short" if name == "SIGKILL" else "")
    lines = [line for line in printed if line and not line.startswith(" ")]
    errors = [line for line in lines if re.match(r"backbones: error: |[\w.]*(?:Error|Exception|Interrupt)\b", line)]
    return (errors or lines or [f"ended with code {code}"])[-1].removeprefix("backbones: error: ")


def _size(checkpoint: Path) -> int:
    """Bytes of a checkpoint, in one file or in shards."""
    return sum(file.stat().st_size for file in (checkpoint, *checkpoint.glob("*")) if file.is_file())


def _first_image(task: type[Task], checkpoint: Path) -> Any:
    """The images of the first validation batch of one, as the model takes them."""
    trained = read_checkpoint(checkpoint, task.name)["hyper_parameters"]
    one = ["--data.batch_size=1", "--data.num_workers=0"]
    data = CommandLine("validate", task, [*as_trained(task, checkpoint, trained), *one]).datamodule
    data.setup("validate")
    return next(iter(data.val_dataloader()))[0]


def _cell(name: str, value: Any) -> Any:
    """A figure with the digits that matter."""
    if not isinstance(value, float):
        return "" if value is None else value
    return f"{value:.{_COLUMNS[name][1] if name in _COLUMNS else 3}f}"
