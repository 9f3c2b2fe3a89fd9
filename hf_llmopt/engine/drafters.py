"""Who guesses for an engine: the drafter that a config names, made for an engine's model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from ..config import OWN, LLMOptConfig, SpeculativeConfig, guarded
from ..errors import InvalidOption, UnsupportedModel
from ..speculative import Drafter, DraftModelDrafter, Speculator, SuffixDrafter, Translation, first_layers
from ..speculative.eagle import EagleModel, Follower, Head, check_fits, load_eagle, load_mtp
from .probe import input_weight
from .proof import pass_seconds
from .runner import Runner
from .second import SecondModel, second_model
from .taps import Taps

if TYPE_CHECKING:
    from .engine import EngineLoop

# Makes an engine, from its model, config and lock.
NewLoop = Callable[[PreTrainedModel, LLMOptConfig, threading.Condition], "EngineLoop"]


def make_speculator(runner: Runner, config: LLMOptConfig, new_loop: NewLoop) -> Speculator | None:
    """What drafts the tokens of an engine's requests; `None` if nobody asked for drafts.

    Args:
        runner: Of the engine.
        config: What its caller asked for.
        new_loop: Makes the engine of a second model.

    Raises:
        InvalidOption: The drafter does not fit the model.
        UnsupportedModel: A draft model cannot be served.
    """
    asked = config.speculative
    if asked is None:
        return None
    if (own := OWN["drafter"].get(asked.method)) is not None:
        drafter = guarded("drafter", str(asked.method), "making it", own, runner.model)
    else:
        drafter = _MAKERS[asked.effective_method](runner, config, asked, new_loop)
    # Where columns stand for positions, tokens beside one another have no place of their own.
    even = runner.graphs is not None
    branches = not even and not runner.store.reads_columns
    vocabulary = input_weight(runner.model).shape[0]
    return Speculator(drafter, vocabulary, partial(pass_seconds, runner), asked.num_tokens, branches, even)


def _suffix(*_: Any) -> Drafter:
    return SuffixDrafter()


def _draft_model(runner: Runner, config: LLMOptConfig, asked: SpeculativeConfig, new_loop: NewLoop) -> Drafter:
    second, translation = second_model(asked, runner.model)
    return _with(second, config, new_loop, translation)


def _layer_skip(runner: Runner, config: LLMOptConfig, asked: SpeculativeConfig, new_loop: NewLoop) -> Drafter:
    return _with(first_layers(runner.model, asked.exit_layer), config, new_loop, adapters=True)


def _with(
    second: PreTrainedModel,
    config: LLMOptConfig,
    new_loop: NewLoop,
    translation: Translation | None = None,
    adapters: bool = False,
) -> Drafter:
    """A drafter that runs a second model, in an engine of its own; the rest is as for `SecondModel`."""
    prompts = config.prompt_cache and replace(config.prompt_cache, path=None)
    own = LLMOptConfig(kv_cache=config.kv_cache, attention=config.attention, prompt_cache=prompts, graphs=config.graphs)
    try:
        loop = new_loop(second, own, threading.Condition())
    except UnsupportedModel as error:
        raise InvalidOption(f"The model that is to draft cannot be served: {error}") from error
    return DraftModelDrafter(SecondModel(second, loop, translation, adapters))


def _eagle(runner: Runner, config: LLMOptConfig, asked: SpeculativeConfig, new_loop: NewLoop) -> Drafter:
    given, model = asked.draft_model, runner.model
    if isinstance(given, str):
        given = load_eagle(given, model)
    if not isinstance(given, EagleModel):
        raise InvalidOption(
            f"method='eagle' takes an EAGLE drafter, its folder or its name on the hub, got {type(given).__name__}. A "
            "model of its own drafts with method='draft_model'."
        )
    check_fits(given, model, runner.device)
    return _reading(given, runner, config)


def _mtp(runner: Runner, config: LLMOptConfig, *_: Any) -> Drafter:
    layers = runner.store.layers
    return _reading(load_mtp(runner.model, layers[-1], len(layers)), runner, config)


def _reading(head: Head, runner: Runner, config: LLMOptConfig) -> Drafter:
    """A drafter that reads the model's hidden states."""
    follower = Follower(head, config)
    runner.taps = Taps(runner.model, len(runner.store.layers), head.needs, follower.observe, follower.move)
    return DraftModelDrafter(follower)


_MAKERS: dict[str, Callable[..., Drafter]] = {  # by method
    "suffix": _suffix,
    "draft_model": _draft_model,
    "layer_skip": _layer_skip,
    "eagle": _eagle,
    "mtp": _mtp,
}
