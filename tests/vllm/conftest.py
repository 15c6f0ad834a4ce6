"""Engine tests run where vLLM is installed and are skipped with the reason elsewhere."""

import importlib.util
import os

import pytest

from .engines import ENVIRONMENT, answers, engine, random_prompt, save_model

if importlib.util.find_spec("vllm") is not None:
    # vLLM reads some of these when it is imported.
    os.environ.update(ENVIRONMENT)


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("vllm") is None:
        skip = pytest.mark.skip(reason="needs vLLM; .ci/vllm builds an environment that has it")
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="session")
def reference_model(model_folder):
    """The transformers model that the engines load."""
    return save_model(model_folder)


@pytest.fixture(scope="session")
def prompts():
    """Two short and two long prompts."""
    return [random_prompt(tokens, seed=tokens) for tokens in (5, 37, 1500, 3000)]


@pytest.fixture(scope="session")
def continuations(prompts):
    """The long prompts cut and continued: most of their keys are in the prefix cache by then."""
    return [prompts[3][:2950] + random_prompt(550, seed=1), prompts[2][:1450] + random_prompt(90, seed=2)]


@pytest.fixture(scope="session")
def stock(model_folder, reference_model, prompts, continuations):
    """What stock vLLM answers to the prompts, to their repetition and to the continuations."""
    with engine(model_folder, 1024) as llm:
        return answers(llm, prompts), answers(llm, prompts), answers(llm, continuations)
