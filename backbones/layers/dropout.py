"""Dropout whose rate is an option of the backbone that it is in."""

from collections.abc import Mapping

from torch import Tensor, nn

from ..errors import InputError

#: What `Backbone` has options for, and what each drops.
DROPOUTS = {
    "attn_drop_rate": "attention weights",
    "proj_drop_rate": "outputs of attention and of MLPs",
    "pos_drop_rate": "cells with their positions",
}


class Dropout(nn.Dropout):
    """Dropout at the rate that one of a `Backbone`'s options says, once it is built; nothing by itself.

    Args:
        option: "attn_drop_rate", "proj_drop_rate" or "pos_drop_rate".
    """

    def __init__(self, option: str):
        super().__init__(0.0)
        self.option = option

    @property
    def rate(self) -> float:
        """What to drop now, for those that drop by themselves, as `scaled_dot_product_attention` does."""
        return self.p if self.training else 0.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.rate else x


def set_dropouts(model: nn.Module, rates: Mapping[str, float]) -> None:
    """Gives the dropouts in a model their rates, by option.

    Raises:
        InputError: a rate is none, or there is nothing that would be dropped.
    """
    name = type(model).__name__
    for option, rate in rates.items():
        if not isinstance(rate, (int, float)) or not 0 <= rate < 1:
            raise InputError(f"{name}: {option}={rate!r} must be a number of at least 0 and under 1")
        found = [module for module in model.modules() if isinstance(module, Dropout) and module.option == option]
        if rate and not found:
            raise InputError(f"{name}: {option}={rate} drops {DROPOUTS[option]}, and there are none; leave it out")
        for module in found:
            module.p = float(rate)
