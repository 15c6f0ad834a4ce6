"""Whose calls the Gluon kernels for Hopper GPUs take, and what is said where they cannot be imported."""

import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from hf_flashprefill.backends.triton import hopper

QUERY = torch.zeros(1, 2, 200, 64, dtype=torch.float16)

WITHOUT_GLUON = """
import os, sys, warnings
os.environ["TRITON_INTERPRET"] = "1"
# The rest of Gluon Triton needs itself.
import triton.experimental.gluon.language
sys.modules["triton.experimental.gluon.language.nvidia.hopper"] = None
import torch, hf_flashprefill as fp
from hf_flashprefill.backends.triton import attend_hopper, energies, energy_lists, hopper, probe, shares
assert attend_hopper is energy_lists.energies_hopper is shares.probe_hopper is None
query = torch.randn(1, 2, 200, 64).half()

def calls():
    for selector in ("blend", "flashprefill"):
        config = fp.FlashPrefillConfig(selector=selector, backend="triton")
        output = fp.flash_prefill_attention(query, query, query, config=config)
        assert output.isfinite().all()

with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    calls()
    # Numpy has its own to say of the interpreter.
    assert not [warning for warning in found if warning.category is UserWarning], found
    hopper.is_hopper = lambda tensor: True
    calls()
    calls()
    assert shares._probing(query, 128, 8) is probe
    assert energy_lists._scoring(query, 128) is energies
    said = [str(warning.message) for warning in found if warning.category is UserWarning]
    assert len(said) == 1 and "cannot be imported" in said[0] and "gluon.language.nvidia.hopper" in said[0], said
"""


@pytest.fixture
def on_hopper(monkeypatch):
    """Tensors count as on a Hopper GPU, and no kernel's import has failed yet."""
    monkeypatch.setattr(hopper, "is_hopper", lambda tensor: True)
    monkeypatch.setattr(hopper, "_import_errors", {})
    hopper._warn_once.cache_clear()
    yield
    hopper._warn_once.cache_clear()


def failing_import(monkeypatch) -> None:
    def fail(name, package):
        raise ImportError(f"no Gluon for {name}")

    monkeypatch.setattr(hopper.importlib, "import_module", fail)


def test_operator_calls_do_without_gluon():
    done = subprocess.run([sys.executable, "-c", WITHOUT_GLUON], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("on_hopper")
def test_a_missing_kernel_is_told_once_when_a_call_is_for_it(monkeypatch):
    failing_import(monkeypatch)
    kernels = [hopper.gluon_module(name) for name in ("attend_hopper", "probe_hopper")]
    assert kernels == [None, None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in (QUERY.float(), QUERY[..., :32]):
            assert not hopper.takes(None, other, 128)
    with pytest.warns(UserWarning, match=r"\(ImportError: no Gluon for \.attend_hopper; ImportError: .*probe_hopper\)"):
        assert not hopper.takes(None, QUERY, 128)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not hopper.takes(None, QUERY, 128)


def test_other_gpus_are_told_nothing(monkeypatch):
    monkeypatch.setattr(hopper, "_import_errors", {})
    failing_import(monkeypatch)
    assert hopper.gluon_module("attend_hopper") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not hopper.takes(None, QUERY, 128)


@pytest.mark.usefixtures("on_hopper")
def test_a_kernel_set_aside_on_purpose_is_not_missed():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not hopper.takes(None, QUERY, 128)


@pytest.mark.parametrize("fits", [True, False])
def test_a_kernel_takes_what_fits_it_on_a_hopper_gpu(monkeypatch, fits):
    asked = []
    kernel = SimpleNamespace(fits=lambda *arguments: asked.append(arguments) or fits)
    assert not hopper.takes(kernel, QUERY, 128, 8)
    assert not asked
    monkeypatch.setattr(hopper, "is_hopper", lambda tensor: True)
    assert hopper.takes(kernel, QUERY, 128, 8) is fits
    assert asked == [(QUERY, 128, 8)]
