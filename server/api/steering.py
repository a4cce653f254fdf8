"""From the wire's ``steering`` object to strengths by pair; what the members read is in ``engine.member_prompts``.

Pure functions; every refusal names the field.
"""

from paceline.server.api.schemas import SteeringBody
from paceline.server.engine.interface import ModelInfo, check_strengths, native_only
from paceline.server.engine.member_prompts import Strengths
from paceline.server.errors import InvalidRequestError


def strengths_of(wish: SteeringBody | None, model: ModelInfo) -> Strengths:
    """What a request asks for, by pair; None switches a pair off.

    Raises:
        InvalidRequestError: not exactly one of the fields, no such pair, an ambiguous one, or a strength outside its
            limits.
    """
    if wish is None:
        return {}
    if model.engine != "native":
        raise native_only("steering")
    given = {name: value for name, value in (("alpha", wish.alpha), ("beta", wish.beta)) if value is not None}
    if len(given) + (wish.weights is not None) != 1:
        raise _bad("'steering' takes exactly one of 'alpha', 'beta' and 'weights'.")
    if model.steering is None:
        raise _bad(f"The model '{model.name}' is not steered; leave 'steering' out or ask for another model.")
    if wish.weights is not None:
        wished = {name: value or None for name, value in wish.weights.items()}
    else:
        parameter, value = next(iter(given.items()))
        wished = {_only_pair(parameter, model): None if parameter == "alpha" and value == 0 else value}
    check_strengths(wished, model.steering.pairs)
    return wished


def _only_pair(parameter: str, model: ModelInfo) -> str:
    """The one pair whose strength has this name."""
    assert model.steering is not None
    names = [pair.name for pair in model.steering.pairs if pair.parameter == parameter]
    if len(names) == 1:
        return names[0]
    what = f"several pairs with {parameter}" if names else f"no pair with {parameter}"
    known = ", ".join(pair.name for pair in model.steering.pairs)
    raise _bad(f"The model '{model.name}' has {what}; name one in 'steering.weights': {known}.", parameter)


def _bad(message: str, field: str | None = None) -> InvalidRequestError:
    return InvalidRequestError(message, param="steering" if field is None else f"steering.{field}")
