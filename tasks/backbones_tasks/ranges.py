"""What each number among the options may be: one table for the command line, for checkpoints and for Python."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backbones.errors import InputError

MAX_SIDE = 16384  # pixels; a float32 crop of this side is 3 GiB


@dataclass(frozen=True)
class Range:
    """From `low` to `high`, each one included unless it is open; lists and tuples are of such numbers.

    also: a value outside that is allowed, too, such as -1 for "no limit". rising: a list must not fall. lists: whether
    they are of such numbers; else they are something else, such as the indices of devices.
    """

    low: float = 0
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    also: int | None = None
    rising: bool = False
    lists: bool = True

    def __contains__(self, value: float) -> bool:
        if value == self.also:
            return True
        over = value > self.low if self.open_low else value >= self.low
        return math.isfinite(value) and over and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        words = f"must be {'over' if self.open_low else 'at least'} {self.low:g}"
        if self.high < math.inf:
            words += f" and {'under' if self.open_high else 'at most'} {self.high:g}"
        return words + (f", or {self.also}" if self.also is not None else "")


_COUNT, _SOME, _SIDE, _SHARE = Range(), Range(1), Range(1, MAX_SIDE), Range(0, 1)
_PART = Range(0, 1, open_high=True)
_SEED = Range(0, 2**32 - 1)
_BATCHES = Range()  # a number of batches, or a share of them

#: By section and option; `TASK:section.option` is that of one task alone. A test walks over all options for numbers
#: that are missing here.
RANGES: dict[str, Range] = {
    "seed_everything": _SEED,
    "model.lr": Range(),
    "model.weight_decay": Range(),
    "model.layer_decay": Range(0, 1, open_low=True),
    "model.backbone_lr": Range(),
    "model.freeze_epochs": _COUNT,
    "model.unfreeze_every": _COUNT,
    "model.warmup": _SHARE,
    "model.warmup_epochs": Range(),
    "model.warmup_steps": _COUNT,
    "model.warmup_lr": Range(),
    "model.ema": _PART,
    "model.distill_weight": Range(),
    "model.distill_temperature": Range(open_low=True),
    "model.num_classes": _SOME,
    "model.seed": _SEED,
    "model.ignore_index": Range(0, 65535),
    "model.class_weights": Range(),
    "model.inference.scales": Range(0, 16, open_low=True),
    "model.inference.window": Range(32, MAX_SIDE),
    "model.inference.overlap": _PART,
    "model.image_size": _SIDE,
    "model.drop_rate": _PART,
    "model.label_smoothing": _PART,
    "model.mixup": Range(),
    "model.cutmix": Range(),
    "model.mixup_prob": _SHARE,
    "model.mixup_switch_prob": _SHARE,
    "model.crop": Range(0, 1, open_low=True),
    "data.batch_size": _SOME,
    "data.crop_size": _SIDE,
    "data.image_size": _SIDE,
    "data.scale": Range(0, 100, open_low=True, rising=True),
    "classification:data.scale": Range(0, 1, open_low=True, rising=True),
    "data.flip": _SHARE,
    "data.color_jitter": Range(),
    "data.ra_operations": _SOME,
    "data.ra_magnitude": Range(0, 30),
    "data.random_erasing": _SHARE,
    "data.copy_paste": _SHARE,
    "data.padding": _COUNT,
    "data.crop": Range(0, 1, open_low=True),
    "data.val_fraction": Range(0, 1, open_low=True, open_high=True),
    "data.split_seed": _SEED,
    "data.num_workers": Range(0, 1024),
    "data.ignore_index": Range(0, 65535),
    "data.shapes.size": Range(16, MAX_SIDE),
    "data.shapes.train": _SOME,
    "data.shapes.val": _SOME,
    "data.seed": _SEED,
    "data.bands": _COUNT,
    "data.mean": Range(-math.inf),
    "data.std": Range(open_low=True),
    "data.nodata": Range(-math.inf),
    "data.range": Range(-math.inf),
    "trainer.devices": Range(1, also=-1, lists=False),
    "trainer.num_nodes": _SOME,
    "trainer.fast_dev_run": _COUNT,
    "trainer.max_epochs": Range(1, also=-1),
    "trainer.min_epochs": _COUNT,
    "trainer.max_steps": Range(1, also=-1),
    "trainer.min_steps": _COUNT,
    "trainer.limit_train_batches": Range(0, open_low=True),
    "trainer.limit_val_batches": _BATCHES,
    "trainer.limit_test_batches": _BATCHES,
    "trainer.limit_predict_batches": _BATCHES,
    "trainer.overfit_batches": _BATCHES,
    "trainer.val_check_interval": Range(0, open_low=True),
    "trainer.check_val_every_n_epoch": _SOME,
    "trainer.num_sanity_val_steps": Range(0, also=-1),
    "trainer.log_every_n_steps": _COUNT,
    "trainer.accumulate_grad_batches": _SOME,
    "trainer.gradient_clip_val": Range(),
    "trainer.reload_dataloaders_every_n_epochs": _COUNT,
}


def check_ranges(task: str, section: str, values: Mapping[str, Any], name: str | None = None) -> None:
    """Raise InputError for the first number that is out of its range.

    Args:
        task: whose options they are; some have ranges of their own.
        section: "model", "data" or "trainer"; "" for options of none.
        values: options by name, nested ones as mappings.
        name: what the section is called in errors, such as "data.heads.seg".
    """
    for option, value in _flat(values):
        key = f"{section}.{option}" if section else option
        allowed = RANGES.get(f"{task}:{key}", RANGES.get(key))
        if allowed is None:
            continue
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        numbers = (list(value) if allowed.lists else []) if listed else [value]
        numbers = [number for number in numbers if isinstance(number, int | float) and not isinstance(number, bool)]
        shown = f"{name or section}.{option}" if section else option
        if not all(number in allowed for number in numbers):
            raise InputError(f"{shown}={_plain(value)} {allowed}")
        if allowed.rising and numbers != sorted(numbers):
            raise InputError(f"{shown}={_plain(value)} must not fall: the smaller number first")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        nested = value if isinstance(value, Mapping) else vars(value) if hasattr(value, "__dict__") else None
        if nested is None:
            yield f"{prefix}{key}", value
        else:
            yield from _flat(nested, f"{prefix}{key}.")
