"""The exception tree: one class for each thing a user can fix.

```
LLMOptError
├── InvalidOption        llmopt= names an option or value that does not exist            (ValueError)
├── UnsupportedModel     this model cannot be optimized at all                          (TypeError)
├── NotServed            strict=True, and the call would not get what it asks for       (ValueError)
├── InvalidRequest       the inputs of one request cannot be generated from             (ValueError)
│   ├── EmptyPrompt      a row without a single unmasked token
│   ├── ObjectInUse      a processor, criterion or streamer of the user serves another live request
│   ├── PromptTooLong    more tokens than the model has positions for
│   └── TokenOutOfRange  an id outside the vocabulary
├── OutOfPages           the KV cache's budget cannot hold the request                  (MemoryError)
├── InvalidPromptCache   a saved prompt is damaged or belongs to another model          (ValueError)
├── CalibrationFailed    nothing to calibrate on, or the model cannot be calibrated     (ValueError)
├── InvalidText          a text to evaluate on is empty or too short                    (ValueError)
├── InvalidCheckpoint    files are damaged, mixed, or not what their config says        (ValueError)
├── UnsupportedQuantization  a format, or a weight in it, that cannot be handled        (ValueError)
├── InvalidLogits        the model produced NaN                                         (ArithmeticError)
├── RequestFailed        the model's forward pass raised                                (RuntimeError)
├── CallbackFailed       a processor, criterion, eviction method ... of the user raised (RuntimeError)
├── RequestCancelled     the request was cancelled before it finished                   (RuntimeError)
├── DeadlineExceeded     the request did not finish by its deadline                     (TimeoutError)
├── EngineFull           as many requests wait as may wait                              (RuntimeError)
├── EngineClosed         the engine was closed before the request finished              (RuntimeError)
└── InstallConflict      another library changed transformers after hf_llmopt did       (RuntimeError)
```
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class LLMOptError(Exception):
    """Base class of every error hf_llmopt raises on purpose."""


class InvalidOption(LLMOptError, ValueError):
    """`llmopt=` was given an option or a value that does not exist."""


class UnsupportedModel(LLMOptError, TypeError):
    """The model cannot be optimized at all; the message names the reason."""


class NotServed(LLMOptError, ValueError):
    """`strict=True` was set, and only transformers' own loop serves the call, or nothing would be guessed for it."""


class InvalidRequest(LLMOptError, ValueError):
    """The inputs of one request cannot be generated from."""


class EmptyPrompt(InvalidRequest):
    """A row of the prompt has no unmasked token."""


class ObjectInUse(InvalidRequest):
    """A processor, criterion or streamer of the user, which may carry state, serves another live request."""


class PromptTooLong(InvalidRequest):
    """The request needs more positions than the model has."""


class TokenOutOfRange(InvalidRequest):
    """A token id lies outside the model's vocabulary."""


class OutOfPages(LLMOptError, MemoryError):
    """The KV cache's budget cannot hold the request; the message says what fits."""


class InvalidPromptCache(LLMOptError, ValueError):
    """A saved prompt is damaged, or was made by another model, with other weights or another page size."""


class CalibrationFailed(LLMOptError, ValueError):
    """The calibration set is empty or unfit for the model, or the model does not run on it block by block."""


class InvalidText(LLMOptError, ValueError):
    """A text to evaluate on is empty or too short."""


class InvalidCheckpoint(LLMOptError, ValueError):
    """Quantized files, or those of a drafter, are damaged, mixed, or not what their config says."""


class UnsupportedQuantization(LLMOptError, ValueError):
    """A file format, or a weight in it, that cannot be read or written; the message says what can."""


class InvalidLogits(LLMOptError, ArithmeticError):
    """The model's logits contain NaN."""


class RequestFailed(LLMOptError, RuntimeError):
    """The model's forward pass raised while it computed the request; see `__cause__`."""

    @classmethod
    def from_forward(cls, error: BaseException) -> RequestFailed:
        """Wrap what the forward pass raised."""
        failed = cls(f"The model's forward pass raised {type(error).__name__}: {error}")
        failed.__cause__ = error
        return failed


class CallbackFailed(LLMOptError, RuntimeError):
    """What is the user's own, a logits processor or what was registered, raised or gave what it must not."""


class RequestCancelled(LLMOptError, RuntimeError):
    """The request was cancelled before it finished."""


class DeadlineExceeded(LLMOptError, TimeoutError):
    """The request did not finish by its deadline."""


class EngineFull(LLMOptError, RuntimeError):
    """As many requests wait as may wait; submit again once others have finished."""


class EngineClosed(LLMOptError, RuntimeError):
    """The engine was closed before the request finished."""


class InstallConflict(LLMOptError, RuntimeError):
    """Another library changed a transformers attribute after hf_llmopt did."""


@contextmanager
def about(module: str) -> Iterator[None]:
    """Errors about weights begin with the name of the module whose weights they are."""
    try:
        yield
    except (CalibrationFailed, InvalidCheckpoint, UnsupportedQuantization) as error:
        raise type(error)(f"{module}: {error}") from error.__cause__


def unknown(what: str, given: object, allowed: Iterable[str]) -> InvalidOption:
    """Build the error for an unknown name: what was given, the nearest match, what is allowed."""
    names = sorted(allowed, key=str)
    folded = {str(name).casefold(): name for name in names}
    close = get_close_matches(str(given).casefold(), folded, n=1)
    hint = f" Did you mean {folded[close[0]]!r}?" if close else ""
    return InvalidOption(f"{what} {given!r} does not exist.{hint} Allowed: {', '.join(map(repr, names))}.")
