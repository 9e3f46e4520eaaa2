"""Reading the YAML files that people write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quire.config.values import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


def read_yaml(path: Path) -> Any:
    """A file's content. Raises ConfigError when it cannot be read or is not YAML."""
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
