"""RULER's tasks: what each hides and asks, hand-computed scores, lengths, sources, and the command end to end."""

import json
import re
from collections import Counter
from random import Random

import pytest

from eval import ruler
from eval.commands import UsageError
from eval.ruler_tasks import TASKS, QaRecord, Sources, fit_amount, make_sample, match_all, match_part, split_sentences

SENTENCES = split_sentences("It rains. Nobody came!\nWhy not?  " * 50)
RECORDS = [QaRecord(f"Who is {i}?", [f"Text {i} says so."], [f"Name {i}"]) for i in range(30)]
SOURCES = Sources(SENTENCES, {"qa_1": RECORDS, "qa_2": RECORDS})


def sample(name, amount, seed=0):
    return TASKS[name].make(Random(seed), amount, SOURCES)


def test_scores_by_hand():
    assert match_all("It is ABC, then 7.", ["abc", "7", "8", "9"]) == 0.5
    assert match_all("", ["abc"]) == 0
    assert match_part("the CAT sat", ["dog", "cat"]) == 1
    assert match_part("the cat sat", ["dog"]) == 0
    assert {name for name, task in TASKS.items() if task.score is match_part} == {"qa_1", "qa_2"}
    assert len(TASKS) == 13


def test_sentences_are_split():
    assert SENTENCES[:4] == ["It rains.", "Nobody came!", "Why not?", "It rains."]


@pytest.mark.parametrize(
    ("name", "needles", "expected", "value"),
    [
        ("niah_single_1", 1, 1, r"\d{7}"),
        ("niah_single_2", 1, 1, r"\d{7}"),
        ("niah_single_3", 1, 1, r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
        ("niah_multikey_1", 4, 1, r"\d{7}"),
        ("niah_multikey_2", 61, 1, r"\d{7}"),
        ("niah_multikey_3", 61, 1, r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
        ("niah_multivalue", 4, 4, r"\d{7}"),
        ("niah_multiquery", 4, 4, r"\d{7}"),
    ],
)
def test_needles(name, needles, expected, value):
    made = sample(name, 60)
    hidden = re.findall(r"One of the special magic (\w+) for (\S+) is: (\S+)\.", made.prompt)
    assert len(hidden) == needles
    asked = re.search(r"What (?:is|are all) the special magic \w+ for (.+) mentioned in", made.prompt).group(1)
    keys = re.split(r",? and |, ", asked)
    assert sorted(v for _, key, v in hidden if key in keys) == sorted(made.expected)
    assert len(made.expected) == expected
    assert all(re.fullmatch(value, text) for text in made.expected)
    singular = expected == 1
    assert made.prompt.startswith("A special magic" if singular else "Some special magic")
    assert made.answer_start.endswith(" is" if singular else " are")
    assert asked in made.answer_start
    # What a model that copies the needle would say.
    assert TASKS[name].score(" ".join(made.expected), made.expected) == 1
    assert sample(name, 60) == made
    assert sample(name, 60, seed=1) != made


def test_essays_are_whole_but_for_the_needles():
    made = sample("niah_multikey_1", 60)
    context = made.prompt.split("afterwards.\n")[1].split("\nWhat is")[0]
    left = [s for s in split_sentences(context) if not s.startswith("One of the special")]
    start = SENTENCES.index(left[0])
    # Every one has two words.
    assert left == (SENTENCES * 2)[start : start + 30]


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.score is match_all])
def test_every_sample_fills_its_length(name):
    """Whatever stretch of a text of very uneven sentences and words it has got."""
    uneven = [" ".join(["a" * (1 + i % 5) ** 3] * (1 + i % 7) ** 3) + "." for i in range(100)]
    task, sources, length = TASKS[name], Sources(uneven), 9000

    def count(made):
        return len(made.prompt + made.answer_start) // 3

    amount = fit_amount(task, sources, count, length, "0")
    for seed in range(8):
        made = make_sample(task, sources, count, length, amount, str(seed))
        assert 0.98 * length <= count(made) + task.new_tokens <= length


def test_the_key_asked_for_has_one_value(monkeypatch):
    """Few keys, so that many of those between are drawn that are hidden."""
    monkeypatch.setattr("eval.ruler_tasks.word_pairs", lambda: ["sad-sun", "old-oak", "red-rag"])
    for seed in range(5):
        made = sample("niah_multikey_2", 60, seed)
        key = re.search(r"magic number for (\S+) mentioned", made.prompt).group(1)
        assert re.findall(rf"for {key} is: (\d+)\.", made.prompt) == made.expected


def test_variable_tracking_follows_the_chain():
    made = sample("vt", 40)
    question = made.prompt.split("Memorize and track")[2]
    value = re.search(r"assigned the value (\d+) in the text", question).group(1)
    follows = dict(re.findall(r"VAR (\w{5}) = (?:VAR )?(\w+)", question))
    assert len(follows) == len(made.expected) == 5
    for name in made.expected:
        while name in follows:
            name = follows[name]
        assert name == value
    # An assignment stands after the one it refers to.
    places = [question.index(f"VAR {name} =") for name in made.expected]
    assert places == sorted(places)
    assert "5 variables are assgined" in made.answer_start


@pytest.mark.parametrize(("amount", "length", "often", "seldom"), [(100, 4095, 6, 1), (60, 4096, 30, 3)])
def test_common_words_are_the_most_common(amount, length, often, seldom):
    made = TASKS["cwe"].sample("0", amount, SOURCES, length)
    listed = made.prompt.split("appear most often.\n")[2].split("\nQuestion")[0]
    words = re.findall(r"(\d+)\. (\S+)", listed)
    assert [int(number) for number, _ in words] == list(range(1, len(words) + 1))
    counts = Counter(word for _, word in words)
    assert len(counts) == amount
    assert {counts[word] for word in made.expected} == {often}
    assert {count for word, count in counts.items() if word not in made.expected} == {seldom}
    assert len(made.expected) == 10


def test_frequent_words_follow_zipf():
    made = sample("fwe", 2000)
    counts = Counter(made.prompt.split("coded words. ")[1].split("\nQuestion")[0].split())
    order = [word for word, _ in counts.most_common(4)]
    assert order == ["...", *made.expected]
    # n / k^2 / zeta(2), rounded down: 1215, 303, 135, 75.
    assert [counts[word] for word in order] == [1215, 303, 135, 75]
    assert min(counts.values()) == 1


def test_questions_show_their_documents_among_others():
    made = sample("qa_1", 12)
    number = re.search(r"Question: Who is (\d+)\?$", made.prompt).group(1)
    assert made.expected == [f"Name {number}"]
    assert f"Text {number} says so." in made.prompt
    assert re.findall(r"Document (\d+):", made.prompt) == [str(i) for i in range(1, 13)]


@pytest.mark.parametrize("name", TASKS)
def test_lengths_are_filled(name):
    def count(made):
        return len((made.prompt + made.answer_start).split())

    length = 400 if name.startswith("qa") else 2500
    amount = fit_amount(TASKS[name], SOURCES, count, length, "0")
    for seed in "012":
        made = make_sample(TASKS[name], SOURCES, count, length, amount, seed)
        used = count(made) + TASKS[name].new_tokens
        # 30 documents of one line each do not fill 400 words; everything else must.
        assert used <= length
        assert used > (0 if name.startswith("qa") else 0.9 * length)
    with pytest.raises(ValueError, match="length must be at least"):
        fit_amount(TASKS[name], SOURCES, count, 30, "0")


def test_source_records():
    squad = {"question": "Q?", "context": "C", "answers": {"text": ["A", "B"], "answer_start": [0, 1]}}
    hotpot = {"question": "Q?", "answer": "A", "context": {"title": ["T", "U"], "sentences": [["a ", "b"], ["c"]]}}
    plain = {"question": "Q?", "documents": ["D", "E"], "answers": ["A"]}
    unanswerable = squad | {"answers": {"text": [], "answer_start": []}}
    assert ruler.qa_records([squad, hotpot, unanswerable, plain], "--qa-1") == [
        QaRecord("Q?", ["C"], ["A", "B"]),
        QaRecord("Q?", ["T\na b", "U\nc"], ["A"]),
        QaRecord("Q?", ["D", "E"], ["A"]),
    ]
    # One string is no list of characters, and an empty one no answer: it is part of any.
    strings = [{"question": "Q?", "documents": "D", "answers": "Paris"}, plain | {"answers": ["", " "]}]
    strings.append({"question": "Q?", "context": ["C"], "answer": ["A", ""]})
    assert ruler.qa_records(strings, "--qa-1") == [QaRecord("Q?", ["D"], ["Paris"]), QaRecord("Q?", ["C"], ["A"])]
    for wrong in ({"text": "C"}, plain | {"answers": [["A"]]}, plain | {"answers": None}, plain | {"question": 5}):
        with pytest.raises(UsageError, match="records with question"):
            ruler.qa_records([wrong], "--qa-2")
    with pytest.raises(UsageError, match="no question with an answer"):
        ruler.qa_records([unanswerable], "--qa-2")


def test_chat_templates_wrap_the_prompt(recall_model):
    tokenizer = recall_model[1]
    made = sample("niah_single_1", 3)
    plain = tokenizer.decode(ruler.encode_sample(tokenizer, made))
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    try:
        chat = tokenizer.decode(ruler.encode_sample(tokenizer, made))
    finally:
        tokenizer.chat_template = None
    assert plain == made.prompt + made.answer_start
    assert chat == f"<user>{made.prompt}<assistant>{made.answer_start.strip()}"


def test_the_command_end_to_end(tmp_path, capsys, monkeypatch):
    questions = tmp_path / "questions.jsonl"
    records = [{"question": r.question, "documents": r.documents, "answers": r.answers} for r in RECORDS]
    questions.write_text("".join(json.dumps(record) + "\n" for record in records))
    text, path = tmp_path / "essay.txt", tmp_path / "ruler.json"
    text.write_text(" ".join(SENTENCES))
    # The bundled model answers nothing; put one right answer into the patched state's mouth to see it scored.
    answer, calls = ruler.answer, []

    def answering(model, tokenizer, ids, new_tokens):
        calls.append(new_tokens)
        said, seconds = answer(model, tokenizer, ids, 2)
        return ("it is name " + re.search(r"Who is (\d+)", tokenizer.decode(ids)).group(1)) if len(
            calls
        ) == 4 else said, seconds

    monkeypatch.setattr(ruler, "answer", answering)
    arguments = ["--tasks", "niah_single_2", "qa_1", "--qa-1", str(questions), "--dataset", str(text), "--device", "cpu"]
    # A task named twice is asked once.
    arguments[1:1] = ["niah_single_2"]
    assert ruler.main([*arguments, "--lengths", "800", "--limit", "1", "--output", str(path)]) == 0
    assert calls == [128, 128, 32, 32]
    record = json.loads(path.read_text())
    assert [(row["task"], row["patched_score"]) for row in record["rows"]] == [("niah_single_2", 0), ("qa_1", 1)]
    assert all(row["density"] <= 1 and row["tokens"] <= 800 for row in record["rows"])
    average = record["summary"][-1]
    assert (average["task"], average["unpatched"], average["patched"], average["change"]) == ("average", 0, 0.5, 0.5)
    assert re.search(r"average +0.0 +50.0\n", capsys.readouterr().out)


def test_samples_that_stayed_dense_are_counted():
    row = {"length": 2048, "unpatched_score": 1, "patched_score": 1}
    rows = [row | {"task": name, "density": d} for name, d in (("vt", 0.5), ("vt", None), ("cwe", None), ("cwe", None))]
    summary = ruler.summarise(rows)
    assert [(e["task"], e["density"], e["dense"]) for e in summary] == [("vt", 0.5, 1), ("cwe", None, 2), ("average", 0.5, 3)]
    assert ruler.summary_table(summary).endswith("0.500, 3 of 4 dense")
    del summary[-1]["dense"]
    assert ruler.summary_table(summary).endswith("  0.500"), "as in results from before they were counted"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "qa_1"], "--tasks qa_1 needs a source: give --qa-1"),
        (["--tasks", "sorting"], "--tasks"),
        (["--samples", "0"], "--samples must be at least 1"),
        (["--tasks", "vt", "--lengths", "50"], "--lengths, for --tasks vt: length must be at least"),
        (["--tasks", "qa_1", "--qa-1", "./none.jsonl"], "--qa-1 ./none.jsonl: there is no such file"),
    ],
)
def test_mistakes(arguments, message, tmp_path):
    text = tmp_path / "essay.txt"
    text.write_text(" ".join(SENTENCES))
    with pytest.raises(UsageError, match=message):
        ruler.main([*arguments, "--dataset", str(text), "--device", "cpu"])
