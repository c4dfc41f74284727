"""What can go wrong between a chat and its server."""


class ChatError(Exception):
    """A sentence for whoever chats."""


class NoServerError(ChatError):
    """Nobody answers at the address."""


class KeyNeededError(ChatError):
    """The server wants an API key, or another one."""
