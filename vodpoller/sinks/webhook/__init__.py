"""Events as HTTP requests."""
