"""Write or check all that is made of the committed measurements: see `pages.py`."""

import sys

from benchmarks.report.pages import main

sys.exit(main())
