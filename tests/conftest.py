"""Without a GPU, Triton kernels run in Triton's interpreter, which must be chosen before triton is imported."""

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers would otherwise each take every core.
    torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--soak-cases", type=int, default=int(os.environ.get("SOAK_CASES", 10_000)), help="random calls per soak test"
    )
    parser.addoption("--soak-seed", type=int, default=int(os.environ.get("SOAK_SEED", 0)), help="which random calls")
    parser.addoption("--soak-variant", type=int, help="on a GPU, the only one of strategies.GPU_VARIANTS to call")


def pytest_collection_modifyitems(items):
    if not HAS_GPU:
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def device():
    """Where kernels run: the GPU if there is one, else the CPU under the interpreter."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture
def hopper():
    """The test needs a Hopper GPU, which the Gluon kernels are for."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the Gluon kernels are for Hopper GPUs")


@pytest.fixture(scope="session", autouse=True)
def _no_measurements_of_this_machine(tmp_path_factory):
    """What somebody measured here must not decide what tests see, nor tests what anybody sees here."""
    os.environ["HF_FLASHPREFILL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """No measurement of the crossover is known; the path of the file they are kept in."""
    from hf_flashprefill.crossover import known

    monkeypatch.setenv("HF_FLASHPREFILL_CACHE", str(tmp_path / "cache"))
    known.reload()
    known._warn_once.cache_clear()
    yield tmp_path / "cache" / "crossover.json"
    known.reload()


@pytest.fixture
def soak_cases(request):
    """How many random calls a soak test makes, their seed, and the only variant that they call on a GPU, or None."""
    return tuple(request.config.getoption(f"--soak-{name}") for name in ("cases", "seed", "variant"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def recall_model():
    """The bundled model and its tokenizer."""
    from eval.models import BUNDLED_MODEL, load_model

    return load_model(str(BUNDLED_MODEL), "cpu", "float32")


@pytest.fixture(scope="session")
def recall_states(recall_model):
    """Query [1, Hq, S, D] and key [1, Hkv, S, D] of every layer of the bundled model on a real prompt of 2000 tokens."""
    from random import Random

    import hf_flashprefill.attention as seam
    from eval.haystack import encode, standard_library_text
    from eval.needle import middle_prompt
    from hf_flashprefill import patched

    model, tokenizer = recall_model
    corpus = encode(tokenizer, standard_library_text("held_out")[:100_000])
    prompt = middle_prompt(tokenizer, corpus, 2000, [0.0, 0.5, 1.0], Random(0))
    states, operator = [], seam.flash_prefill_attention

    def recording(query, key, value, **kwargs):
        states.append((query.clone(), key.clone()))
        return operator(query, key, value, **kwargs)

    seam.flash_prefill_attention = recording
    try:
        with patched(model, min_seq_len=1), torch.no_grad():
            model(torch.tensor([prompt.ids]), logits_to_keep=1)
    finally:
        seam.flash_prefill_attention = operator
    return states
