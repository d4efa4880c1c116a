"""The checks, one file a claim. Importing this package imports every module in it.

A new check is a new file here with a function under `theory_checks.registry.check`; nothing
else has to be edited. Modules whose name starts with an underscore are helpers, imported by use.
"""

from __future__ import annotations

import importlib
import pkgutil

for _module in sorted(pkgutil.iter_modules(__path__), key=lambda found: found.name):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")
