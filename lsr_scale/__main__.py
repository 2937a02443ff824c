"""`python -m lsr_scale`: the `lsr-scale` command where it is not on the path."""

import sys

from lsr_scale.cli import main

sys.exit(main())
