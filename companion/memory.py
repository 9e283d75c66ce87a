"""What a model keeps in memory for its backward pass."""

from collections.abc import Callable

import torch


def kept_bytes(model: torch.nn.Module, function: Callable) -> int:
    """Bytes that autograd keeps between function(model) and its backward pass, the parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held on to, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(model)
    total = sum(storage.nbytes() for storage in kept.values())
    del result
    return total
