"""`quantization_config` of files in a format of a user's own, see `hf_llmopt.register`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import fields
from .configs import LINEAR, flat

if TYPE_CHECKING:
    from .recipe import Recipe


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `Recipe`."""
    method = str(config["quant_method"])
    scheme = flat(method, config, fields.flag(config, "sym", True))
    return {"method": method, "groups": ((LINEAR, scheme),), "skipped": fields.names(config, "modules_to_not_convert")}


def write(recipe: Recipe) -> dict[str, Any]:
    """What `read` reads."""
    ((_, scheme),) = recipe.groups
    return {
        "quant_method": recipe.method,
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "modules_to_not_convert": list(recipe.skipped),
    }
