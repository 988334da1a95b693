"""The texts of token ids, as the definition names them."""

from influence_cli.errors import DefinitionError
from influence_cli.run.definition import Definition


class TokenTexts:
    """Calls the definition's token(id), once for each token."""

    def __init__(self, definition: Definition) -> None:
        self.definition = definition
        self._texts: dict[int, str] = {}

    def of(self, token: int) -> str:
        """The text of a token, or its id where the definition has no `token`.

        Raises DefinitionError where `token` returns something else than a text.
        """
        if token not in self._texts:
            definition = self.definition
            value = definition.call("token", token) if definition.has("token") else str(token)
            if not isinstance(value, str):
                raise DefinitionError(
                    f"token({token}) returned a {type(value).__name__}",
                    "expected: the token's text",
                )
            self._texts[token] = value
        return self._texts[token]
