"""An HTTP server that speaks OpenAI's API, on one `Engine`. Needs the extra `serve`."""

from .app import create_app
from .auth import Keys
from .limits import Limits
from .server import Server
from .service import Service

__all__ = ["Keys", "Limits", "Server", "Service", "create_app"]
