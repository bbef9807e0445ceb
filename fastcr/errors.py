"""Mistakes that a user can put right."""


class UsageError(Exception):
    """Something the user can put right; commands print it as one line and exit with status 2."""


def one_line(error: Exception, limit: int = 200) -> str:
    """What an error of another library says, on one line of at most `limit` characters."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
