"""What is wrong with a model or a text, said in one line."""


class BadInput(ValueError):
    """The model, the text or a number cannot be looked at; the message names it and the way out."""
