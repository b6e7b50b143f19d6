"""A state dict that must be all of a module's: that of a run, or of a saved model."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import WeightsError
from .fitting import require_sound

__all__ = ["require_whole"]


def require_whole(module: nn.Module, state: Mapping[str, Any], source: str) -> None:
    """Check that a state dict is exactly that of a module; nothing is changed.

    Args:
        module: what it is to be loaded into.
        state: tensors by name.
        source: the file, for the message.

    Raises:
        WeightsError: names or shapes differ, or a tensor holds no finite numbers of the right kind.
    """
    own = module.state_dict()
    other = {name: value for name, value in state.items() if not isinstance(name, str) or not isinstance(value, Tensor)}
    if other:
        raise WeightsError(f"{source}: its weights are no tensors by name: {_some(other)}")
    shapes = {
        name: f"{tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if state[name].shape != own[name].shape
    }
    found = {
        "unknown to the model: {}": state.keys() - own.keys(),
        "missing in the checkpoint: {}": own.keys() - state.keys(),
        "of another shape: {}": [f"{name} {shape}" for name, shape in shapes.items()],
    }
    why = [sentence.format(_some(names)) for sentence, names in found.items() if names]
    if why:
        raise WeightsError(
            f"{source} holds the weights of another model than {type(module).__name__} as it is built, of another "
            f"backbone, other classes or other options: {'; '.join(why)}"
        )
    for name, value in state.items():
        try:
            require_sound(name, value, own[name])
        except WeightsError as error:
            raise WeightsError(f"{source}: {error}") from None


def _some(names: Any) -> str:
    names = sorted(map(str, names))
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
