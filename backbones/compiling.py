"""Models that are compiled block by block."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Blocks, onednn


def compile_blocks(model: nn.Module) -> None:
    """Compiles, in place, each block of a model by itself, for images of any size.

    A block is what stands in a row with others of its class. State dicts and copies do not show it. On an x86 CPU,
    float32 linear layers run by oneDNN: a compiler sends them to MKL, which takes twice as long on AMD's processors,
    forward and backward.
    """
    for module in model.children():
        row = list(module) if isinstance(module, (nn.Sequential, nn.ModuleList)) else []
        if isinstance(module, Blocks) or (len(row) > 1 and len({type(block) for block in row}) == 1):
            for block in row:
                block.compile(dynamic=True, backend=_compile)
        else:
            compile_blocks(module)


def _compile(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    """PyTorch's own compiler, after linear layers have been exchanged."""
    from torch._inductor import config  # takes a second to import
    from torch._inductor.compile_fx import compile_fx

    if onednn.HAS_OPERATORS:
        for node in graph.graph.nodes:
            if node.op == "call_function" and node.target is F.linear:
                node.target = _linear
        graph.recompile()
    exact = {"strict_output_strides": True} if hasattr(config, "strict_output_strides") else {}
    return compile_fx(graph, inputs, config_patches=exact)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if input.device.type != "cpu" or input.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return F.linear(input, weight, bias)
    return onednn.learning_linear(input, weight, bias)
