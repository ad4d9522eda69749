"""How the API refuses a request."""


class ApiError(Exception):
    """The answer is an error.

    Args:
        code: As Tencent names it.
        message: For a person.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
