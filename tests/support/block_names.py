"""Names of blocks for nodes that no store has made."""


def block(text: str) -> str:
    """A name that a block could have: 64 hex digits, other ones for another text of up to 32
    letters."""
    return text.encode().hex().zfill(64)


def text_of(name: str) -> str:
    """The reverse."""
    return bytes.fromhex(name).lstrip(b"\0").decode()
