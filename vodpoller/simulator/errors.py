"""The error of a request that the API refuses."""


class ApiError(Exception):
    """The API answers a request with an error.

    Args:
        code: Tencent's code of the error.
        message: The text for a person.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
