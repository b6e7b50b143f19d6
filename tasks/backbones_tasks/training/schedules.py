"""How the learning rate rises and falls: timm's schedules, step by step, and PyTorch's by a score."""

from collections.abc import Mapping
from typing import Any

from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from backbones.errors import InputError

from ..options import nearest

_CYCLES = {"cycle_limit", "cycle_mul", "cycle_decay", "cooldown_epochs", "min_lr", "warmup_prefix"}
_NOISE = {"noise", "noise_pct", "noise_std", "noise_seed"}
#: What `schedule_options` has an effect on which schedule; timm's others are refused, for they would have none.
OPTIONS: dict[str, set[str]] = {
    "cosine": {*_CYCLES, *_NOISE, "k_decay"},
    "tanh": {*_CYCLES, *_NOISE},
    "poly": {*_CYCLES, *_NOISE, "k_decay", "decay_rate"},
    "step": {*_NOISE, "decay_epochs", "decay_rate", "warmup_prefix"},
    "multistep": {*_NOISE, "decay_milestones", "decay_rate", "warmup_prefix"},
    "constant": _NOISE,
    "wsd": {*_NOISE, "decay_epochs", "decay_fn", "min_lr"},
    "rsqrt": {*_NOISE, "decay_epochs", "decay_fn", "min_lr", "stable_timescale"},
    "plateau": {"decay_rate", "patience_epochs", "min_lr", "monitor", "plateau_mode"},
    "none": set(),
}


class Plateau:
    """A linear warm-up, step by step, and then PyTorch's ReduceLROnPlateau, validation by validation.

    Args:
        optimizer: whose groups may have an `lr_scale` each
        warmup: timm's constant schedule with the warm-up
        warmup_steps: how long that takes
        monitor: the score, or the loss, by which it falls
        options: of ReduceLROnPlateau
    """

    def __init__(
        self, optimizer: Optimizer, warmup: Scheduler, warmup_steps: float, monitor: str, options: Mapping[str, Any]
    ):
        self.optimizer, self.warmup, self.warmup_steps, self.monitor = optimizer, warmup, warmup_steps, monitor
        self.by_score = ReduceLROnPlateau(optimizer, **options)

    def step_update(self, num_updates: int) -> None:
        """Go on with the warm-up, after so many steps."""
        if num_updates - 1 < self.warmup_steps:
            self.warmup.step_update(num_updates)

    def judge(self, scores: Mapping[str, Any], num_updates: int) -> None:
        """Lower the rate if the score has not got better for long; it does not count during the warm-up."""
        if self.monitor not in scores:
            raise InputError(
                f"schedule_options: monitor={self.monitor!r} is not measured; {nearest(self.monitor, scores)}"
            )
        if num_updates > self.warmup_steps:
            self.by_score.step(float(scores[self.monitor]))

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self.by_score, name) for name in ("best", "num_bad_epochs", "last_epoch")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self.by_score).update({name: state[name] for name in self.state_dict() if name in state})


def make_schedule(
    options: Mapping[str, Any], optimizer: Optimizer, steps: int, epochs: float, metric: str = "score"
) -> Scheduler | Plateau | None:
    """The learning-rate schedule of a task's options, stepped by batch over all `steps`; None for "none".

    Args:
        options: of `Task`
        optimizer: whose groups it sets
        steps: of the whole training, which all cycles and what comes after them share
        epochs: the same in epochs
        metric: what "plateau" watches unless told

    Raises:
        InputError: an unknown schedule, or an option that is unknown to it or cannot be
    """
    name, own = options["schedule"], dict(options["schedule_options"] or {})
    told = f"model.schedule={name!r}, schedule_options={options['schedule_options']}"
    if name not in OPTIONS:
        raise InputError(f"model.schedule={name!r} is unknown; {nearest(str(name), OPTIONS)}")
    _check_options(name, own, told)
    if name == "none" and any(options.get(f"warmup_{unit}") is not None for unit in ("epochs", "steps", "lr")):
        raise InputError("model.schedule='none' has no warm-up; that of 'constant' has")
    per_epoch = steps / epochs
    warmup = _warmup_epochs(options, epochs, per_epoch)
    common = {
        "warmup_epochs": warmup,
        "warmup_lr": options["lr"] / 100 if options.get("warmup_lr") is None else options["warmup_lr"],
        "step_on_epochs": False,
        "updates_per_epoch": per_epoch,
    }
    try:
        if name == "plateau":
            rising, _ = create_scheduler_v2(optimizer, "constant", num_epochs=epochs, **common)
            return _plateau(optimizer, rising, warmup * per_epoch, metric, own)
        if name == "poly":
            own = {"decay_rate": 0.9} | own
        length = _first_cycle(epochs, warmup, own, told) if "cycle_limit" in OPTIONS[name] else epochs
        scheduler, _ = create_scheduler_v2(optimizer, name, num_epochs=length, **common, **own)
    except (TypeError, ValueError, AssertionError) as error:  # a value that cannot be
        raise InputError(f"{told}: {error}") from error
    if scheduler is None and name != "none":  # what timm has long said of a name that it does not know
        raise InputError(f"{told}: Unknown scheduler")
    return scheduler


def _check_options(name: str, own: Mapping[str, Any], told: str) -> None:
    """Raise InputError for options without an effect."""
    for option in own:
        if option in ("warmup_epochs", "warmup_lr"):
            raise InputError(f"{told}: {option} is an option of its own, --model.{option}")
        if option not in OPTIONS[name]:
            takes = nearest(option, sorted(OPTIONS[name])) if OPTIONS[name] else "it takes none"
            raise InputError(f"{told}: {name} has no option {option!r}; {takes}")
    if own.keys() & _NOISE and "noise" not in own:
        raise InputError(f"{told}: there is no noise without noise, such as {{noise: [0.4, 0.9]}}")
    cycles = own.get("cycle_limit", 1)
    if type(cycles) is not int or cycles < 1:
        raise InputError(f"{told}: cycle_limit must be a whole number of cycles, from 1")
    if cycles == 1 and own.keys() & {"cycle_mul", "cycle_decay"}:
        raise InputError(f"{told}: cycle_mul and cycle_decay change what follows the first cycle: give cycle_limit")
    if not own.get("cycle_mul", 1) > 0:
        raise InputError(f"{told}: cycle_mul must be over 0")


def _warmup_epochs(options: Mapping[str, Any], epochs: float, per_epoch: float) -> float:
    """How long the warm-up takes: a share of all, epochs, or steps."""
    given = {name: options[name] for name in ("warmup_epochs", "warmup_steps") if options.get(name) is not None}
    if len(given) == 2:
        raise InputError("model.warmup_epochs and model.warmup_steps say the same: give one of them")
    if not given:
        return options["warmup"] * epochs
    ((name, value),) = given.items()
    warmup = value / per_epoch if name == "warmup_steps" else value
    if warmup > epochs:
        raise InputError(f"model.{name}={value} is longer than the training, which is {epochs:g} epochs")
    return warmup


def _first_cycle(epochs: float, warmup: float, own: dict[str, Any], told: str) -> float:
    """Epochs of the first of all cycles, which timm is to be told, so that all of them end with the training."""
    cycles, factor = own.get("cycle_limit", 1), own.get("cycle_mul", 1)
    apart = own.get("cooldown_epochs", 0) + (warmup if own.get("warmup_prefix") else 0)
    if not 0 <= apart < epochs:
        raise InputError(f"{told}: of {epochs:g} epochs, {epochs - apart:g} are left for the cycles")
    whole = epochs - apart if apart else epochs
    return whole / (cycles if factor == 1 else (factor**cycles - 1) / (factor - 1))


def _plateau(
    optimizer: Optimizer, rising: Scheduler, warmup_steps: float, metric: str, own: Mapping[str, Any]
) -> Plateau:
    monitor = own.get("monitor", metric)
    options = {
        "mode": own.get("plateau_mode", "min" if "loss" in monitor else "max"),
        "factor": own.get("decay_rate", 0.1),
        "patience": own.get("patience_epochs", 10),
        "min_lr": own.get("min_lr", 0.0),
    }
    return Plateau(optimizer, rising, warmup_steps, monitor, options)
