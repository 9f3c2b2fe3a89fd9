"""Who drafts, by the arguments of transformers' assisted decoding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..config import SpeculativeConfig
from ..errors import InvalidOption
from .active import Active

# What names each drafter in transformers' own terms.
_NAMES = {
    "mtp": "use_mtp",
    "layer_skip": "assistant_early_exit",
    "suffix": "prompt_lookup_num_tokens",
    "draft_model": "assistant_model",
}


def named_drafter(call: Mapping[str, Any], active: Active) -> SpeculativeConfig | None:
    """The section that a call's arguments ask for; `None` if they name no drafter of ours.

    They go before the model's default.

    Args:
        call: The arguments of `_assisted_decoding`.
        active: The call.

    Raises:
        InvalidOption: The call's own `llmopt=` names another drafter, or a number of tokens is none.
    """
    generation_config, assistant = call["generation_config"], call.get("assistant_model")
    early, lookup = generation_config.assistant_early_exit, generation_config.prompt_lookup_num_tokens
    own = getattr(generation_config, "use_mtp", None)  # 5.17 does not know it
    if assistant is None and lookup is None and early is None and not own:
        return None
    if lookup is not None and (type(lookup) is not int or lookup < 1):
        raise InvalidOption(f"prompt_lookup_num_tokens is a number of tokens from 1 on, got {lookup!r}.")
    who: dict[str, Any] = dict.fromkeys(("draft_model", "tokenizer", "draft_tokenizer", "exit_layer"))
    if own:
        who |= {"method": "mtp"}
    elif early is not None:
        who |= {"method": "layer_skip", "exit_layer": early}
    elif assistant is None:
        who |= {"method": "suffix"}
    else:
        who |= {"method": "draft_model", "draft_model": assistant}
        if call.get("assistant_tokenizer") is not None:
            who |= {"tokenizer": call.get("tokenizer"), "draft_tokenizer": call["assistant_tokenizer"]}
    section = active.config.speculative or SpeculativeConfig()
    others = section.method not in ("auto", who["method"]) or section.draft_model not in (None, who["draft_model"])
    if active.named and others:
        raise InvalidOption(
            f"llmopt= names the drafter {section.effective_method!r}, and {_NAMES[who['method']]}= of the same call "
            f"another, {who['method']!r}. Leave one of them out."
        )
    return replace(section, **who)
