"""Foreign modules under the contract: whatever form their maps have, and whatever sizes they take."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import Backbone
from .errors import InputError
from .layers import ceil_div, crop_to, pad_to_multiple

__all__ = ["wrap"]

#: Multiples of the coarsest stride that are tried as what image sides have to be multiples of.
_MULTIPLES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 14, 16)
#: Class, distillation and register tokens that may stand before those of the grid.
_PREFIX = 16


@dataclass(frozen=True)
class _Form:
    """How a module hands out its maps: finest or coarsest first, and what the dimensions of each are."""

    coarse_first: bool
    layouts: tuple[str, ...]


class _Wrapped(Backbone):
    overwrites = True

    def __init__(self, module: nn.Module, size_divisor: int | None, image_size: tuple[int, int] | None, **options: Any):
        super().__init__(**options)
        self.module = module
        self.image_size = image_size
        self.size_divisor = size_divisor or (1 if image_size else max(self._all_strides))
        self._finds_divisor = size_divisor is None and image_size is None
        self._form: _Form | None = None
        self._count = len(self._all_strides)  # of maps that are looked at, finest first

    def finish(self) -> None:
        self._leave_out_coarse_parts()
        super().finish()

    def _leave_out_coarse_parts(self) -> None:
        """Does without the parts of maps coarser than those asked for, where the others are the same without them."""
        count = self.out_indices[-1] + 1
        parts = {name: self.get_submodule(name) for name, _ in self._parts()[1 + count :]}
        whole = self._trial() if parts else None
        if whole is None:
            return
        self._count = count
        for name in parts:
            self.set_submodule(name, _LeftOut())
        part = self._trial()
        if part is None or not all(map(_same, part, whole)):
            self._count = len(whole)
            for name, module in parts.items():
                self.set_submodule(name, module)

    @property
    def _name(self) -> str:
        return type(self.module).__name__

    def forward_features(self, images: Tensor) -> Sequence[Tensor]:
        if self.image_size is not None:
            given = F.interpolate(images, self.image_size, mode="bilinear", align_corners=False, antialias=True)
            return [_resize(m, size) for m, size in zip(self._maps(given), self._grids(images), strict=True)]
        try:
            return self._maps(images)
        except InputError:
            raise
        except Exception as error:  # the module's own, of any kind: perhaps of sides that it cannot take
            if not self._finds_divisor or _is_traced(images):
                raise
            divisor = self._find_divisor(images, error)
            if divisor == self.size_divisor:
                raise
        self.size_divisor = divisor
        maps = self._maps(pad_to_multiple(images, divisor))
        return [crop_to(m, *size) for m, size in zip(maps, self._grids(images), strict=True)]

    def _grids(self, images: Tensor) -> list[tuple[int, ...]]:
        """Height and width of each map of images."""
        strides = self._all_strides[: self._count]
        return [tuple(ceil_div(side, stride) for side in images.shape[-2:]) for stride in strides]

    @property
    def _all_strides(self) -> list[int]:
        return [level["reduction"] for level in self.feature_info.info]

    @property
    def _all_channels(self) -> list[int]:
        return [level["num_chs"] for level in self.feature_info.info]

    def _call(self, images: Tensor) -> tuple[list[Tensor], tuple[int, ...]]:
        """What the module returns, as a list, and the height and width that it was given."""
        returned = self.module(images)
        if isinstance(returned, Tensor):
            returned = [returned]
        elif not isinstance(returned, (list, tuple, Mapping)) or hasattr(type(returned), "feature_maps"):
            returned = getattr(returned, "feature_maps", returned)  # of transformers' backbones
        maps = list(returned.values()) if isinstance(returned, Mapping) else returned
        if not isinstance(maps, (list, tuple)) or not all(isinstance(m, Tensor) for m in maps):
            raise InputError(
                f"{self._name} returned a {type(returned).__name__}; wrap takes a module that returns maps: a tensor, "
                "a list or tuple of tensors, or a dict of them"
            )
        if len(maps) != len(self._all_channels):
            raise InputError(
                f"{self._name} returned {len(maps)} maps where {len(self._all_channels)} were declared; make channels "
                "and strides agree with what it returns"
            )
        return list(maps), tuple(images.shape[-2:])

    def _maps(self, images: Tensor) -> list[Tensor]:
        """The module's maps as NCHW, finest first."""
        maps, size = self._call(images)
        forms = self._possible_forms(maps, size)
        form = self._form if self._form in forms else forms[0]
        if not _is_traced(maps[0]):
            if len(forms) > 1 and self._form is None:
                form = self._tell_apart(forms, maps[0])
            self._form = form
        ordered = (maps[::-1] if form.coarse_first else maps)[: self._count]
        rows = zip(ordered, form.layouts, self._grids(images), strict=True)
        return [_LAYOUTS[layout].to_nchw(m, *grid) for m, layout, grid in rows]

    def _possible_forms(self, maps: list[Tensor], size: tuple[int, ...]) -> list[_Form]:
        """The forms that the shapes of maps allow, the usual one first; `InputError` where none does."""
        forms = []
        for coarse_first in (False, True) if len(maps) > 1 else (False,):
            ordered = (maps[::-1] if coarse_first else maps)[: self._count]
            fits = [
                [name for name, layout in _LAYOUTS.items() if layout.fits(m.shape, channels, stride, size)]
                for m, channels, stride in zip(ordered, self._all_channels, self._all_strides, strict=False)
            ]
            if all(fits):  # one layout for all where that is possible
                common = [name for name in _LAYOUTS if all(name in names for names in fits)]
                rows = [(name,) * len(fits) for name in common] or [tuple(names[0] for names in fits)]
                forms += [_Form(coarse_first, row) for row in rows]
                if _is_traced(maps[0]):
                    break
        if not forms:
            told = ", ".join(str(tuple(m.shape)) for m in maps)
            expected = ", ".join(
                str(("B", c, *(ceil_div(side, s) for side in size)))
                for c, s in zip(self._all_channels, self._all_strides, strict=True)
            )
            raise InputError(
                f"{self._name} returned maps {told} for images of {size[0]} x {size[1]}, and channels="
                f"{self._all_channels}, strides={self._all_strides} mean {expected}; make them agree with what it "
                "returns (NCHW, NHWC and tokens (B, N, C) are understood, finest or coarsest first)"
            )
        return forms

    def _tell_apart(self, forms: list[_Form], like: Tensor) -> _Form:
        """Which of several forms it is, by images whose maps have sides that no channels have."""
        side = math.lcm(self.size_divisor, max(self._all_strides))
        if self.image_size is not None:
            return forms[0]
        for factor in range(1, 9):
            size = (side * factor, side * (factor + 1))
            cells = {ceil_div(s, stride) for s in size for stride in self._all_strides}
            if cells.isdisjoint(self._all_channels):
                maps, seen = self._try(like.new_zeros(1, self.in_chans, *size))
                possible = self._possible_forms(maps, seen)
                return next((form for form in forms if form in possible), forms[0])
        return forms[0]

    def _find_divisor(self, images: Tensor, error: Exception) -> int:
        """What sides have to be multiples of, found by small black images that are not square."""
        for side in self._trial_sides():
            with suppress(Exception):
                maps, size = self._try(images.new_zeros(1, self.in_chans, side, 2 * side))
                self._possible_forms(maps, size)
                return side
        coarsest = max(self._all_strides)
        raise InputError(
            f"{self._name} takes no images of sides that {coarsest} divides, up to {side}: {type(error).__name__}: "
            f"{error}. If its sides have to be multiples of something else, pass size_divisor=; if it takes one size "
            "alone, image_size="
        ) from error

    def _trial_sides(self) -> list[int]:
        coarsest = max(self._all_strides)
        if not self._finds_divisor:
            return [math.lcm(self.size_divisor, coarsest)]
        return [coarsest * multiple for multiple in _MULTIPLES]

    def _trial(self) -> list[Tensor] | None:
        """The maps of a made-up image of a size that the module takes; None where it takes none of those tried."""
        like = next(self.module.parameters(), torch.zeros(()))
        for side in self._trial_sides():
            shape = (1, self.in_chans, *(self.image_size or (side, 2 * side)))
            image = torch.arange(math.prod(shape), device=like.device).to(like.dtype).sin().reshape(shape)
            with suppress(Exception), torch.no_grad(), _in_eval_mode(self.module):
                return self._maps(image)
        return None

    def _try(self, images: Tensor) -> tuple[list[Tensor], tuple[int, ...]]:
        """`_call` in eval mode, without gradients; nothing of it stays."""
        with torch.no_grad(), _in_eval_mode(self.module):
            return self._call(images)

    # What a module of any kind can keep

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        set_in_module: Any = getattr(self.module, "set_grad_checkpointing", None)
        if set_in_module is not None:
            set_in_module(enable)
        elif enable:
            raise InputError(
                f"wrap({self._name}): checkpointing=True is not possible, because the module has no "
                "set_grad_checkpointing(enable); recompute activations within it"
            )

    def freezable(self) -> list[list[nn.Module | nn.Parameter]]:
        parts = self._parts()
        own = list(self.module.parameters(recurse=False))  # positions, for one: they go with the stem
        return [[*own, part] if i == 0 else [part] for i, (_, part) in enumerate(parts)]

    def group_matcher(self, coarse: bool = False) -> Mapping[str, Any]:
        stem, *stages = (name.replace(".", r"\.") for name, _ in self._parts())
        own = r"|^module\.[^.]+$" if stages else ""
        return {
            "stem": rf"^{stem}\.{own}" if stages else r"^module",
            "blocks": [(rf"^{stage}\.", (i,)) for i, stage in enumerate(stages)],
        }

    def _parts(self) -> list[tuple[str, nn.Module]]:
        """The stem and a part per map, where the module has just so many children; else the module as a whole."""
        parts = []
        for name, child in self.module.named_children():
            listed = isinstance(child, nn.ModuleList)
            parts += [(f"{name}.{i}", c) for i, c in child.named_children()] if listed else [(name, child)]
        if len(parts) != 1 + len(self._all_strides):
            return [("module", self.module)]
        return [(f"module.{name}", part) for name, part in parts]


class _LeftOut(nn.Module):
    """In the place of a part whose map nobody asks for: what comes after it is not looked at either."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return x


@dataclass(frozen=True)
class _Layout:
    """What the dimensions of a map are.

    fits: whether a shape may be that of a map of so many channels and this stride, of images of this size.
    to_nchw: the map as (B, C, H, W), given the grid that it has.
    """

    fits: Callable[[Sequence[int], int, int, tuple[int, ...]], bool]
    to_nchw: Callable[[Tensor, int, int], Tensor]


def _is_width(n: int, channels: int) -> bool:
    """Whether a dimension is that of channels, which are no symbol where programs for any size are traced."""
    return not isinstance(n, torch.SymInt) and n == channels


def _is_grid(sides: Sequence[int], stride: int, size: tuple[int, ...]) -> bool:
    return all(ceil_div(s, stride) == side for side, s in zip(sides, size, strict=True))


def _is_sequence(count: int, stride: int, size: tuple[int, ...]) -> bool:
    height, width = (ceil_div(side, stride) for side in size)
    return 0 <= count - height * width <= _PREFIX


_LAYOUTS = {
    "NCHW": _Layout(
        lambda shape, channels, stride, size: (
            len(shape) == 4 and _is_width(shape[1], channels) and _is_grid(shape[2:], stride, size)
        ),
        lambda m, height, width: m,
    ),
    "NHWC": _Layout(
        lambda shape, channels, stride, size: (
            len(shape) == 4 and _is_width(shape[3], channels) and _is_grid(shape[1:3], stride, size)
        ),
        lambda m, height, width: m.permute(0, 3, 1, 2),
    ),
    "tokens": _Layout(
        lambda shape, channels, stride, size: (
            len(shape) == 3 and _is_width(shape[2], channels) and _is_sequence(shape[1], stride, size)
        ),
        lambda m, height, width: m[:, m.shape[1] - height * width :].mT.unflatten(2, (height, width)),
    ),
    "channels first": _Layout(
        lambda shape, channels, stride, size: (
            len(shape) == 3 and _is_width(shape[1], channels) and _is_sequence(shape[2], stride, size)
        ),
        lambda m, height, width: m[..., m.shape[2] - height * width :].unflatten(2, (height, width)),
    ),
}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (a.is_meta or torch.equal(a, b))


def _resize(m: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(m, size, mode="bilinear", align_corners=False)


def _is_traced(x: Tensor) -> bool:
    """Whether a call stands for many, or has no numbers, so that nothing can be learnt from it."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or x.is_meta
        or isinstance(x, torch._subclasses.FakeTensor)
    )


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


def wrap(
    module: nn.Module,
    channels: Sequence[int],
    strides: Sequence[int] = (4, 8, 16, 32),
    size_divisor: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    **options: Any,
) -> Backbone:
    """A foreign module that returns feature maps, as a `Backbone`.

    The maps may come as a tensor, a list, a tuple or a dict, as NCHW, NHWC or tokens (B, N, C) with prefix tokens
    first, finest or coarsest first; which of these it is, is told by their shapes. Where the module has a stem and a
    part per map as its children, `frozen_stages` and layer-wise rates go by these, and parts of maps coarser than
    `out_indices` asks for are left out if the others are the same without them; else it is one part.

    Args:
        module: called with images (B, C, H, W).
        channels: width of each map, finest first.
        strides: pixels per cell of each map, ascending.
        size_divisor: image sides that the module can take are multiples of this, others are zero-padded; unless given,
            it is the coarsest stride, or what multiple of it the module turns out to take where that one fails.
        image_size: the one size, a side or (height, width), that the module can take; images are resized to it, and
            maps to the sizes that the strides promise.
        **options: options common to all backbones, such as `out_indices`, `frozen_stages` or `norm_eval`.

    Raises:
        InputError: an option that a finished module cannot keep (`drop_path_rate`, `features_only=False`,
            `checkpointing` without its own set_grad_checkpointing); at the first call, maps other than declared.
    """
    name = type(module).__name__
    if not options.get("features_only", True):
        raise InputError(f"wrap({name}) yields feature maps; features_only=False has no meaning here")
    for option, kept in (("drop_path_rate", 0.0), ("drop_rate", 0.0), ("global_pool", "avg")):
        if options.get(option, kept) != kept:
            raise InputError(
                f"wrap({name}): {option}={options[option]!r} is for what builds the module; give it there, not here"
            )
    if size_divisor is not None and image_size is not None:
        raise InputError(f"wrap({name}): size_divisor pads to multiples, image_size resizes to one size; pass one")
    if size_divisor is not None and size_divisor < 1:
        raise InputError(f"wrap({name}): size_divisor={size_divisor} must be at least 1")
    if isinstance(image_size, int):
        image_size = (image_size, image_size)
    return _Wrapped(module, size_divisor, image_size, channels=channels, strides=strides, **options)
