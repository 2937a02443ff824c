"""What libraries do again in every run, done once in a process. It imports no library before it is asked to."""

import functools
from collections.abc import Callable
from typing import Any


def do_once(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Compile an adapter's card once, not in every save; read once whether a package is installed.

    A tiny run asks for packages 35 times, and each is a file of metadata to parse.

    Args:
        set_attribute: pytest's, of what is undone later, or the built-in one.
    """
    from accelerate.utils import imports
    from jinja2.environment import Environment

    compile_anew, made = Environment.compile, {}

    def compile_once(self, *arguments, **options):
        if not self.shared:  # with filters and the like of its own
            return compile_anew(self, *arguments, **options)
        key = self, arguments, tuple(options.items())
        if key not in made:
            made[key] = compile_anew(self, *arguments, **options)
        return made[key]

    set_attribute(Environment, "compile", compile_once)
    set_attribute(imports, "_is_package_available", functools.cache(imports._is_package_available))
