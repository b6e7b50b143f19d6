"""What training goes by, unless told, for each kind of head."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """What training goes by, unless told.

    lr, weight_decay: of all but norms, biases and position tables. published_lr: factor for what published weights
    hold. clip: the greatest norm of all gradients.
    """

    lr: float = 1e-3
    weight_decay: float = 0.05
    published_lr: float = 1.0
    clip: float = 1.0


#: For what is trained by matching sets of predictions: DETR's norm, and about its rates.
SET_PREDICTION = Recipe(lr=2e-4, weight_decay=1e-4, published_lr=0.1, clip=0.1)
