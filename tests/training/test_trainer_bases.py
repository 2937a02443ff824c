"""The classes before TRL's trainer do not take each other's names: one that is off would change one that is on."""

import itertools

from trl import SFTTrainer

from lsr_scale.config.methods import METHODS
from lsr_scale.training.methods import method_module
from lsr_scale.training.methods.sft import BASES
from lsr_scale.training.optimizers.create import OwnOptimizers
from lsr_scale.training.trainers import ClassifierTrainer


def own_names(base: type) -> set[str]:
    """Return the names that a class adds, without those of the library's that it overrides."""
    names = {*vars(base), *vars(base).get("__annotations__", {})}
    return {name for name in names if not name.startswith("__") and not hasattr(SFTTrainer, name)}


def test_no_two_bases_add_the_same_name():
    assert sum(bool(own_names(base)) for base in BASES) >= 5
    for one, other in itertools.combinations(BASES, 2):
        assert own_names(one) & own_names(other) == set(), (one.__name__, other.__name__)


def test_every_trainer_takes_the_optimizers_of_this_package():
    for method in METHODS:
        assert OwnOptimizers in method_module(method).BASES, method
    assert issubclass(ClassifierTrainer, OwnOptimizers)
