"""The methods, one line each. The first is the default of `score`."""

from influence_cli.methods import dve, grad_cos, grad_dot, random, repsim, tracin, tracin_we, unroll
from influence_cli.methods.declaration import Method

_METHODS = (
    tracin.METHOD,
    grad_dot.METHOD,
    grad_cos.METHOD,
    dve.METHOD,
    unroll.METHOD,
    tracin_we.METHOD,
    repsim.METHOD,
    random.METHOD,
)
METHODS: dict[str, Method] = {method.name: method for method in _METHODS}
