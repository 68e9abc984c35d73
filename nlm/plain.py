"""Values as JSON has them, which knows neither arrays nor numbers that are not finite."""

from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """What is not finite is null."""
    match value:
        case dict():
            return {str(key): plain(inner) for key, inner in value.items()}
        case list() | tuple():
            return [plain(inner) for inner in value]
        case np.ndarray():
            return plain(value.tolist())
        case float() if not np.isfinite(value):
            return None
    return value
