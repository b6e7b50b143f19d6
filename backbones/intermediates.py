"""Maps of all stages beside the final features, after timm's `forward_intermediates`."""

from collections.abc import Sequence
from typing import Any

from timm.models._features import feature_take_indices
from torch import Tensor

from .errors import InputError
from .layers import Layer, ceil_div, crop_to

__all__ = ["Intermediates", "take_indices"]

Indices = int | Sequence[int] | None


class Intermediates(Layer):
    """What `Backbone` has for code that reads intermediates of timm's models."""

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps (B, C, ceil(H / stride), ceil(W / stride)) of the stages, and the final features, as timm returns them.

        Args:
            x: images (B, in_chans, H, W).
            indices: of the stages: None (all), an int for the last n, or indices from 0 or from the end.
            norm: whether the last stage's map is normed by the classifier's norm before pooling.
            stop_early: leave out stages beyond the last that is asked for; the final features are then its own.
            output_fmt: "NCHW", which is how all maps are.
            intermediates_only: return the maps alone.

        Raises:
            InputError: there are no such stages; or a backbone of maps is asked for what only a classifier has.
        """
        model: Any = self  # a backbone, of which this is a part
        name = getattr(model, "canonical_name", type(model).__name__)
        if output_fmt != "NCHW":
            raise InputError(f"{name}: output_fmt={output_fmt!r} is unknown; maps are 'NCHW'")
        model._check_images(x)
        if model.features_only and (norm or not intermediates_only):
            raise InputError(
                f"{name} was built for maps, without the classifier's norm that final features pass: give "
                "intermediates_only=True and norm=False, or build it with features_only=False"
            )
        strides = [level["reduction"] for level in model.feature_info.info]
        sizes = [[ceil_div(side, stride) for side in x.shape[-2:]] for stride in strides]
        if not model.runs_stages:
            if not model.features_only:
                raise InputError(f"{name} has no stages to read; build it with features_only=True")
            taken, _ = take_indices(name, indices, len(model.out_indices))
            features = model.forward_features(model.pad(x))
            return [crop_to(features[i], *sizes[i]) for i in (model.out_indices[n] for n in sorted({*taken}))]
        taken, last = take_indices(name, indices, len(model.stages))
        maps: list[Tensor] = []
        x = model.stem(model.pad(x))
        for i, stage in enumerate(model.stages[: last + 1] if stop_early else model.stages):
            x = model._run(stage, x)
            if i in taken:
                maps.append(crop_to(model.norm(x) if norm and i == len(strides) - 1 else x, *sizes[i]))
        if intermediates_only:
            return maps
        return model.norm(x) if i == len(strides) - 1 else x, maps


def take_indices(name: str, indices: Indices, count: int) -> tuple[list[int], int]:
    """Which of so many features are asked for, as timm counts them, and the last of these."""
    try:
        return feature_take_indices(count, indices if isinstance(indices, int) or indices is None else list(indices))
    except AssertionError as error:
        raise InputError(f"{name}: indices={indices!r} of {count} features: {error}") from None
