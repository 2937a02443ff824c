"""Fused layers under ZeRO-3: DeepSpeed gathers each layer at once, and the factors of all layers for the whole pass.

By itself DeepSpeed gathers the weights of a module when that is called, and a fused layer calls none of those within
it. So its frozen weights are registered as external parameters of the layer: they are gathered before its forward and
before its backward pass, prefetched for the layer before, and released after each. The pairs of several layers are made
together and their gradients come together, so factors are registered with the stack of layers, and are whole from the
beginning of its forward or backward pass to the end. (A layer declared a leaf is gathered likewise, but there DeepSpeed
reduces gradients when the leaf's backward pass is done, and puts zeros for those that are yet to come.)
"""

from typing import Any

from torch import nn

from lsr_scale.fused.eligibility import GATHERED


def gather_by_layer(model: nn.Module, layers: list[str]) -> None:
    """Let fused layers run fused under ZeRO-3; call it before the engine is made.

    Args:
        model: The model, adapted and fused.
        layers: The names of its decoder layers, all in one list.
    """
    import deepspeed

    stack = model.get_submodule(layers[0].rsplit(".", 2)[0])
    for layer in layers:
        for module in model.get_submodule(layer).modules():
            setattr(module, GATHERED, True)

    def register(*_: Any) -> None:
        if not all(hasattr(parameter, "ds_id") for parameter in stack.parameters()):
            return  # a forward before there is an engine, whose marks these are
        for layer in map(model.get_submodule, layers):
            for parameter in layer.parameters():
                deepspeed.zero.register_external_parameter(stack if parameter.requires_grad else layer, parameter)
        hook.remove()

    hook = stack.register_forward_pre_hook(register)
