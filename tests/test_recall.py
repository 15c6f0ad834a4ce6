"""The recall harness on the bundled model: prompts, scores against whole logits, statistics, command."""

import pytest
import torch

from eval import recall
from eval.haystack import encode, standard_library_text
from eval.scoring import score_tokens
from hf_flashprefill import patched, prefill_stats
from tests.inputs import tiny_model


@pytest.fixture(scope="module")
def corpus(recall_model):
    return encode(recall_model[1], standard_library_text("held_out")[:200_000])


@pytest.mark.parametrize("placement", recall.PLACEMENTS)
def test_prompts_hold_facts_before_their_questions(placement, recall_model, corpus):
    tokenizer = recall_model[1]
    (prompt,) = recall.make_prompts(tokenizer, corpus, 1500, 1, facts=4, questions=10, seed=3, placement=placement)
    ids = prompt.ids.tolist()
    assert len(ids) == 1500
    assert tokenizer.decode(ids).count("The secret code of") == 14
    assert len(prompt.questions) == 10
    assert sorted(question.asked_before for question in prompt.questions) == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    for question in prompt.questions:
        code = ids[question.answer]
        assert len(code) == 6
        for distance in (question.distance, question.fact_distance):
            assert ids[question.answer.start - distance : question.answer.stop - distance] == code
        assert (question.distance == question.fact_distance) == (question.asked_before == 0)
        assert not prompt.text[question.answer].any()
    positions = [question.answer.start / 1500 for question in prompt.questions]
    assert positions == sorted(positions)
    if placement == "second-half":
        assert positions[0] > 0.45
    if placement == "end":
        assert positions[0] > 0.85
    # Cut out what is planted: what is left is one stretch of the corpus, but for the first token.
    left = prompt.ids[prompt.text].tolist()
    start = next(i for i in range(len(corpus)) if corpus[i : i + len(left)] == left)
    assert start >= 0


def test_prompts_repeat_and_a_smaller_number_gives_the_first_ones(recall_model, corpus):
    few, many = (recall.make_prompts(recall_model[1], corpus, 900, n, facts=3, questions=5, seed=1) for n in (2, 3))
    assert all(torch.equal(a.ids, b.ids) and a.questions == b.questions for a, b in zip(few, many, strict=False))
    assert not torch.equal(many[0].ids, many[1].ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": 0}, "prompts must be at least 1"),
        ({"facts": 0}, "facts must be at least 1"),
        ({"questions": 0}, "questions must be at least 1"),
        ({"placement": "middle"}, "placement must be one of"),
        ({"length": 50}, "length must be at least"),
    ],
)
def test_prompts_refuse(changes, message, recall_model, corpus):
    with pytest.raises(ValueError, match=message):
        recall.make_prompts(recall_model[1], corpus, **({"length": 900, "prompts": 1} | changes))


def test_scores_equal_those_of_whole_logits(recall_model, corpus, monkeypatch):
    model, tokenizer = recall_model
    # Parts of 7 rows, so that borders between parts are crossed many times.
    monkeypatch.setattr("eval.scoring.LOGITS_AT_ONCE", 7 * model.config.vocab_size)
    (prompt,) = recall.make_prompts(tokenizer, corpus, 1200, 1, facts=5, questions=9, seed=4)
    result = recall.score(model, prompt)
    with torch.no_grad():
        logits = model(prompt.ids[None]).logits[0].double()
    nll = -logits.log_softmax(-1)[:-1].gather(-1, prompt.ids[1:, None])[:, 0]
    torch.testing.assert_close(result.nll[1:], nll.float(), rtol=1e-4, atol=1e-4)
    assert result.nll[0].isnan()
    right = [
        all(logits[i - 1].argmax() == prompt.ids[i] for i in range(q.answer.start, q.answer.stop)) for q in prompt.questions
    ]
    assert result.correct.tolist() == right
    assert result.correct.float().mean() > 0.8


def test_a_wrong_code_in_the_question_is_scored_as_wrong(recall_model, corpus):
    """Scores must be able to fail: the code asked for is not the one stated."""
    model, tokenizer = recall_model
    (prompt,) = recall.make_prompts(tokenizer, corpus, 1000, 1, facts=6, questions=6, seed=5)
    ids = prompt.ids.clone()
    for question in prompt.questions:
        ids[question.answer] = ids[question.answer].roll(1)
    changed = recall.RecallPrompt(prompt.name, ids, prompt.questions, prompt.text)
    assert recall.score(model, prompt).correct.float().mean() > 0.8
    assert recall.score(model, changed).correct.float().mean() < 0.2


def test_a_patched_model_is_scored_as_patched(recall_model, corpus):
    model, tokenizer = recall_model
    (prompt,) = recall.make_prompts(tokenizer, corpus, 2000, 1, facts=6, questions=12, seed=6)
    dense = recall.score(model, prompt)
    with patched(model, alpha=0, min_seq_len=1):
        every = recall.score(model, prompt)
        assert prefill_stats(model).sparse_calls == model.config.num_hidden_layers
    with patched(model, alpha=1, min_seq_len=1, sink_blocks=0, window_blocks=1, dense_tail_blocks=0):
        few = recall.score(model, prompt)
    torch.testing.assert_close(every.nll, dense.nll, rtol=1e-3, atol=1e-3, equal_nan=True)
    assert every.correct.equal(dense.correct)
    assert few.correct.sum() < dense.correct.sum()
    assert few.nll[prompt.text].mean() > dense.nll[prompt.text].mean()


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("gemma2", {"head_dim": 32, "final_logit_softcapping": 0.5}), ("granite", {"logits_scaling": 3.0}), ("cohere", {})],
)
def test_scaled_and_capped_logits(family, overrides):
    model = tiny_model(family, implementation="eager", **overrides)
    ids = torch.randint(2, 199, (80,))
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    nll = torch.nn.functional.cross_entropy(logits[:-1].float(), ids[1:], reduction="none")
    torch.testing.assert_close(score_tokens(model, ids).nll[1:], nll, rtol=1e-4, atol=1e-4)


def test_other_ways_to_logits_are_refused(monkeypatch):
    model = tiny_model()
    forward = type(model).forward

    def doubled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = 2 * output.logits
        return output

    monkeypatch.setattr(type(model), "forward", doubled)
    with pytest.raises(ValueError, match="its logits are not"):
        score_tokens(model, torch.arange(20))


@pytest.mark.parametrize("positions", [slice(None), slice(40, 41)])
def test_logits_that_are_no_numbers_are_refused(positions, monkeypatch):
    model = tiny_model()
    forward = type(model.model).forward

    def overflowing(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.last_hidden_state[:, positions] = float("nan")
        return output

    monkeypatch.setattr(type(model.model), "forward", overflowing)
    with pytest.raises(ValueError, match="logits are not numbers in float32$"):
        score_tokens(model, torch.arange(2, 82))


def test_an_inner_model_of_another_name_is_found(monkeypatch):
    """Llama 4's text model says that it has its inner model as ``language_model``, which is another's."""
    model, ids = tiny_model(), torch.randint(2, 199, (80,))
    expected = score_tokens(model, ids).nll
    monkeypatch.setattr(type(model), "base_model_prefix", "language_model")
    assert model.base_model is model
    torch.testing.assert_close(score_tokens(model, ids).nll, expected, equal_nan=True)
    with pytest.raises(ValueError, match="LlamaModel has no separate output embedding"):
        score_tokens(model.model, ids)
