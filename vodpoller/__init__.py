"""vodpoller: the reliable-callback consumer for Tencent Cloud VOD."""

__version__ = "0.1.0"
