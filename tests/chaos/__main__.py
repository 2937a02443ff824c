"""`python -m tests.chaos`."""

import sys

from tests.chaos.runner import main

sys.exit(main())
