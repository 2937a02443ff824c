"""Fine-tune 4- and 8-bit language models with Kronecker-structured adapters.

Importing this package registers its methods with PEFT.
"""

import logging
import sys as _sys

# bitsandbytes looks on the hub for a CPU inference kernel that training never uses, and warns when it is not there
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

try:
    from lsr_scale import adapters as _adapters  # registers every method with PEFT
    from lsr_scale.adapters.bank import AdapterBank
    from lsr_scale.adapters.hotswap import hotswap_adapter
    from lsr_scale.adapters.methods.kron_lora import KronLoraConfig
    from lsr_scale.adapters.methods.lsr import LsrConfig
    from lsr_scale.errors import UserError
    from lsr_scale.fused import fit_memory, fuse, unfuse
except KeyboardInterrupt:
    # python -m lsr_scale, and the command; launch/train.py does so itself
    if _sys.argv[0].rpartition("/")[2] not in ("-m", "lsr-scale"):
        raise
    print("\nlsr-scale: interrupted", file=_sys.stderr)
    _sys.exit(130)

__version__ = "0.1.0"
__all__ = ["AdapterBank", "KronLoraConfig", "LsrConfig", "UserError", "fit_memory", "fuse", "hotswap_adapter", "unfuse"]

del _adapters
