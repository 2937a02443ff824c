"""Importing this imports `programs.LIBRARIES`, without garbage collections; processes forked later pass over them."""

import gc
import importlib

from tests.helpers.programs import LIBRARIES

gc.disable()
for name in LIBRARIES:
    importlib.import_module(name)
gc.freeze()
gc.enable()
