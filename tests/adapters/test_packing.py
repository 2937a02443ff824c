"""A packed adapter's file: every tensor is exactly what its index implies."""

import pytest
import torch

from lsr_scale import UserError
from lsr_scale.adapters.packing import pack, unpack

# of one module: stacks in 8 or 4 bits of 16 elements, and one too small for that, in float16
FACTORS = {"layer": {"lsr_up_left": torch.ones(1, 4, 4), "lsr_up_weight": torch.ones(1)}}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["packed.0.codes", "packed.0.scales", "packed.1.codes"])
def test_a_tensor_of_another_shape_is_refused_even_with_as_many_elements(name, bits):
    tensors = pack(FACTORS, bits)
    assert [tuple(value.shape) for value in unpack(tensors).values()] == [(1, 4, 4), (1,)]
    right = tensors[name]
    reshaped = right.reshape(()) if right.numel() == 1 else right.reshape(2, -1)
    for wrong in (reshaped, right[..., None], right.float()):
        with pytest.raises(UserError) as caught:
            unpack(tensors | {name: wrong})
        for words in (
            f"{name} (lsr_up_",
            f"expected {list(right.shape)} of {right.dtype}",
            f"got {list(wrong.shape)} of {wrong.dtype}; export the adapter again",
        ):
            assert words in str(caught.value)
    del tensors[name]
    with pytest.raises(UserError, match="got nothing; export the adapter again"):
        unpack(tensors)
