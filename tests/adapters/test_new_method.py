"""A method added as CONTRIBUTING says, one file in `adapters/methods/`, is imported and passes the whole contract."""

import inspect
import sys

import pytest
from peft import PeftType, mapping

from lsr_scale import adapters
from lsr_scale.adapters import METHODS, methods
from lsr_scale.adapters.peft import AdapterConfig, AdapterMethod, register
from tests.adapters import test_contract as contract

FILE = '''
"""LoRA with a trained core.

    dW = scaling * U C D,   U [out, rank],   C [rank, rank],   D [rank, in]
"""

import dataclasses
import math
from collections.abc import Mapping

from torch import Tensor, nn

from lsr_scale.adapters.peft import AdapterConfig, AdapterMethod, Params, Shapes, option, register
from lsr_scale.errors import UserError


@dataclasses.dataclass
class CoreConfig(AdapterConfig):
    """Options of LoRA with a core."""

    core_init: float = option(1.0, "What C's diagonal begins as.")


@register
class Core(AdapterMethod):
    """LoRA with a core."""

    name = "core"
    prefix = "core_"
    config_class = CoreConfig
    parameter_names = ("down", "core", "up")

    @staticmethod
    def parameter_shapes(in_features: int, out_features: int, config: CoreConfig) -> Shapes:
        """Return the factors' shapes; raise UserError where the rank is too large."""
        if config.rank > min(in_features, out_features):
            raise UserError(f"rank={config.rank} is larger than a side of {in_features} -> {out_features}; lower rank")
        return {
            "down": (config.rank, in_features),
            "core": (config.rank, config.rank),
            "up": (out_features, config.rank),
        }

    @staticmethod
    def init_parameters(params: Params, config: CoreConfig) -> None:
        """D Kaiming-uniform, C diagonal, U zero: dW = 0 with a gradient."""
        nn.init.kaiming_uniform_(params["down"], a=math.sqrt(5))
        nn.init.eye_(params["core"]).mul_(config.core_init)
        params["up"].zero_()

    @staticmethod
    def delta_weight(params: Mapping[str, Tensor]) -> Tensor:
        """Return `U C D`."""
        return params["up"] @ params["core"] @ params["down"]

    @staticmethod
    def materialize(params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return `(D, U C)`."""
        return params["down"], params["up"] @ params["core"]
'''


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    """Add the file to `adapters/methods/`, and take all of it away again."""
    folder = tmp_path_factory.mktemp("methods")
    (folder / "core.py").write_text(FILE)
    tables = [METHODS, mapping.PEFT_TYPE_TO_CONFIG_MAPPING, mapping.PEFT_TYPE_TO_TUNER_MAPPING]
    tables += [mapping.PEFT_TYPE_TO_PREFIX_MAPPING, PeftType._member_map_, PeftType._value2member_map_]
    before, members = [dict(table) for table in tables], list(PeftType._member_names_)
    methods.__path__.append(str(folder))
    try:
        adapters.import_methods()
        yield "core"
    finally:
        methods.__path__.remove(str(folder))
        for table, content in zip(tables, before, strict=True):
            table.clear()
            table.update(content)
        PeftType._member_names_[:] = members
        type.__delattr__(PeftType, "CORE")
        del sys.modules["lsr_scale.adapters.methods.core"], methods.core


@pytest.fixture
def low_rank_name(name):
    return name


@pytest.fixture
def ranked_name(name):
    return name


# the contract's tests of any method, over this one
for _key, _test in list(vars(contract).items()):
    if _key.startswith("test_") and {"name", "low_rank_name", "ranked_name"} & {*inspect.signature(_test).parameters}:
        globals()[_key] = _test


def test_its_options_are_those_of_every_method_and_its_own(name):
    assert name in adapters.method_names()
    assert {"rank", "alpha", "target_modules", "core_init"} <= set(adapters.options(name).__annotations__)
    assert adapters.peft_config(name, {"rank": 4}).scaling == 2  # alpha is 2 * rank where it is not set
    assert adapters.SAVED_METHODS[name] is METHODS[name]


def definitions(name):
    return {key: value for key, value in vars(METHODS[name]).items() if key not in ("__abstractmethods__", "_abc_impl")}


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        (("name", "parameter_names"), "Broken: define name, parameter_names; see AdapterMethod"),
        (("delta_weight", "init_parameters"), "Broken: define delta_weight, init_parameters; see AdapterMethod"),
        (("materialize",), "Broken: define materialize or, for updates of full rank, delta_forward"),
    ],
)
def test_what_a_method_lacks_is_named_as_it_is_registered(left_out, message, name):
    defined = definitions(name) | {"name": "broken", "prefix": "broken_"}
    defined = {key: value for key, value in defined.items() if key not in left_out}
    with pytest.raises(TypeError, match=f"^{message}$"):
        register(type("Broken", (AdapterMethod,), defined))
    assert "broken" not in METHODS


def test_a_prefix_of_lora_and_a_config_that_is_no_dataclass_are_refused(name):
    complete = definitions(name)
    with pytest.raises(TypeError, match="prefix 'my_lora_' has lora_ in it"):
        register(type("Mine", (AdapterMethod,), complete | {"name": "mine", "prefix": "my_lora_"}))
    config = type("MineConfig", (AdapterConfig,), {})
    with pytest.raises(TypeError, match=r"MineConfig: decorate it with @dataclasses\.dataclass"):
        register(type("Mine", (AdapterMethod,), complete | {"name": "mine", "prefix": "mine_", "config_class": config}))
    with pytest.raises(KeyError, match=r"a method 'core' already: lsr_scale\.adapters\.methods\.core"):
        register(type("Mine", (AdapterMethod,), complete))
