"""Both backends are what backends/interface.py says."""

import inspect

import pytest

from hf_flashprefill import backends
from hf_flashprefill.backends import torch as torch_backend
from hf_flashprefill.backends import triton as triton_backend
from hf_flashprefill.backends.interface import Backend

FUNCTIONS = {name: function for name, function in vars(Backend).items() if inspect.isfunction(function) and name[0] != "_"}


@pytest.mark.parametrize("backend", [torch_backend, triton_backend])
def test_a_backend_has_every_function_with_the_arguments_that_the_interface_names(backend):
    assert backend.__name__.startswith(backends.__name__)
    assert FUNCTIONS
    for name, function in FUNCTIONS.items():
        wanted = list(inspect.signature(function).parameters)[1:]
        given = inspect.signature(getattr(backend, name)).parameters
        named = [n for n, parameter in given.items() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
        hands_on = len(named) < len(given)
        assert named == [n for n in wanted if n in named or not hands_on], name
