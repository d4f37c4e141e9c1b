"""The engine over HTTP and WebSocket: an OpenAI-style image API, a page that draws while you type, and what operations need."""

from .app import create_app
from .settings import ServerSettings

__all__ = ["ServerSettings", "create_app"]
