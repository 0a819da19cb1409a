"""The version, in one place: ``pyproject.toml`` reads it, ``import fusekern`` shows it."""

__version__ = "0.1.0"
