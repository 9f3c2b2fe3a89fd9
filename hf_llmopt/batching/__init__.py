"""Part 6's room: requests that come and go."""

from .engine import Engine
from .generate_batch import generate_batch
from .handle import RequestHandle
from .pipeline import BatchingPipeline

__all__ = ["BatchingPipeline", "Engine", "RequestHandle", "generate_batch"]
