"""`python -m lsr_scale.model`: fetch and convert the embedded models, for a machine without a connection later on."""

import sys

from lsr_scale.errors import UserError
from lsr_scale.model import builtin

for name in builtin.MODELS:
    try:
        print(builtin.ensure_converted(builtin.PREFIX + name))
    except UserError as error:
        sys.exit(f"lsr-scale: {error}")
