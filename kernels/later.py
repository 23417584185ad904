"""Modules that are imported when something of them is first used: what comes before it, a refusal say, does not wait."""

import importlib
from typing import Any


class Later:
    """The module `name`, whose attributes are looked up as if it were imported."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(importlib.import_module(self._name), attribute)
        setattr(self, attribute, value)
        return value
