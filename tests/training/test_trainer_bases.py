"""The classes before TRL's trainer do not take each other's names: one that is off would change one that is on."""

import itertools

from trl import SFTTrainer

from lsr_scale.training.methods.sft import BASES


def own_names(base: type) -> set[str]:
    """Return the names that a class adds, without those of the library's that it overrides."""
    names = {*vars(base), *vars(base).get("__annotations__", {})}
    return {name for name in names if not name.startswith("__") and not hasattr(SFTTrainer, name)}


def test_no_two_bases_add_the_same_name():
    assert sum(bool(own_names(base)) for base in BASES) >= 5
    for one, other in itertools.combinations(BASES, 2):
        assert own_names(one) & own_names(other) == set(), (one.__name__, other.__name__)
