"""What became of a checkpoint, tensor by tensor."""

from dataclasses import dataclass, field

__all__ = ["LoadReport", "Shape"]

Shape = tuple[int, ...]


@dataclass
class LoadReport:
    """What became of each tensor of a checkpoint and of the model, with shapes."""

    source: str
    layout: str = "own"
    prefix: str = ""
    loaded: dict[str, Shape] = field(default_factory=dict)
    resized: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    mismatched: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    missing: dict[str, Shape] = field(default_factory=dict)
    unexpected: dict[str, Shape] = field(default_factory=dict)
    share: float = 0.0
    #: Why tables of `mismatched` cannot be resized.
    notes: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        under = f" under {self.prefix!r}" if self.prefix else ""
        lines = [
            f"{self.source}: {self.share:.1%} of the backbone's parameters loaded, {self.layout} layout{under}",
            f"  loaded {len(self.loaded)}",
        ]
        for title in ("resized", "mismatched", "missing", "unexpected"):
            found = getattr(self, title)
            lines.append(f"  {title} {len(found)}")
            lines += [f"    {key} {_arrow(shape)}" for key, shape in list(found.items())[:20]]
            if len(found) > 20:
                lines.append(f"    ... and {len(found) - 20} more")
        return "\n".join(lines)


def _arrow(shape: Shape | tuple[Shape, Shape]) -> str:
    if shape and isinstance(shape[0], tuple):
        return f"{_arrow(shape[0])} -> {_arrow(shape[1])}"
    return "x".join(map(str, shape)) or "scalar"
