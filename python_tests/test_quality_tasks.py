"""Task generators: the same sample twice, evidence where it is said to be, answers nowhere else, lengths."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from loop_models import byte_tokenizer

from specprefill_kernels import models
from specprefill_kernels.quality.tasks import TASKS, make
from specprefill_kernels.quality.tasks.haystack import Document, Filler
from specprefill_kernels.quality.tasks.sample import Draft, count_tokens, fit

TOKENS = 6000  # bytes
SEEDS = range(4)
TEXT_TASKS = [task for task in TASKS if task not in ("few_shot", "code_completion")]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def samples(tokenizer):
    return {(task, seed): make(task, seed, TOKENS, tokenizer) for task in TASKS for seed in SEEDS}


def blanked(sample):
    """The prompt with its evidence overwritten."""
    text = sample.prompt
    for start, end in sample.evidence:
        text = text[:start] + "#" * (end - start) + text[end:]
    return text


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_gives_the_same_sample_again_and_another_seed_another(task, tokenizer, samples):
    assert make(task, 1, TOKENS, tokenizer) == samples[task, 1]
    prompts = {samples[task, seed].prompt for seed in SEEDS}
    assert len(prompts) == len(SEEDS)
    assert len({samples[task, seed].answers for seed in SEEDS}) == len(SEEDS)


def test_another_process_with_another_hash_seed_makes_the_same_prompts(samples):
    script = (
        "import sys, hashlib; sys.path.insert(0, sys.argv[1])\n"
        "from loop_models import byte_tokenizer\n"
        "from specprefill_kernels.quality.tasks import TASKS, make\n"
        "for task in TASKS: print(hashlib.sha256(make(task, 2, int(sys.argv[2]), byte_tokenizer()).prompt.encode())"
        ".hexdigest())"
    )
    output = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parent), str(TOKENS)],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": "77"},
    ).stdout.split()  # fmt: skip
    assert output == [hashlib.sha256(samples[task, 2].prompt.encode()).hexdigest() for task in TASKS]


@pytest.mark.parametrize("task", TASKS)
def test_the_prompt_is_as_long_as_asked_for(task, tokenizer, samples):
    for seed in SEEDS:
        sample = samples[task, seed]
        assert 0.98 * TOKENS <= sample.prompt_tokens <= TOKENS
        assert sample.prompt_tokens == count_tokens(sample.prompt, tokenizer)
        assert sample.context_tokens == TOKENS


@pytest.mark.parametrize("task", [task for task in TASKS if task != "code_completion"])
def test_answers_lie_in_the_evidence_and_nowhere_else(task, samples):
    for seed in SEEDS:
        sample = samples[task, seed]
        assert sample.evidence
        rest, found = blanked(sample), "\n".join(sample.evidence_texts())
        for answer in sample.answers:
            assert answer in found
            assert answer not in rest


def test_evidence_ranges_are_sorted_apart_and_before_the_question(samples):
    for sample in samples.values():
        ends = [0]
        for start, end in sample.evidence:
            assert ends[-1] <= start < end
            assert sample.prompt[start:end] == sample.prompt[start:end].strip()
            ends.append(end)
        assert ends[-1] < len(sample.prompt) - 40


def test_each_needle_is_one_sentence_with_its_answer(samples):
    for seed in SEEDS:
        for task, count in (("niah_single", 1), ("niah_multikey", 1), ("niah_multivalue", 3)):
            sample = samples[task, seed]
            assert len(sample.evidence) == len(sample.answers) == count
            for text in sample.evidence_texts():
                assert re.fullmatch(r"(The|One of the) secret codes? of the \w+ \w+ is \d{5}\.", text)


def test_multikey_asks_for_one_of_four_needles_that_differ(samples):
    asked = set()
    for seed in SEEDS:
        sample = samples["niah_multikey", seed]
        needles = re.findall(r"The secret code of the (\w+ \w+) is (\d{5})\.", sample.prompt)
        assert len(needles) == len({value for _, value in needles}) == 4
        assert len({word for key, _ in needles for word in key.split()}) == 8  # keys share no word
        key = re.search(r"What is the secret code of the (\w+ \w+)\?", sample.prompt).group(1)
        assert dict(needles)[key] == sample.answers[0]
        asked.add([name for name, _ in needles].index(key))
    assert len(asked) > 1


def test_a_chain_of_variables_leads_from_the_value_to_every_name(samples):
    for seed in SEEDS:
        sample = samples["variable_tracking", seed]
        assigned = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", sample.prompt))
        assert len(assigned) == 6
        value = re.search(r"assigned the value (\d+)", sample.prompt).group(1)

        def origin(name, assigned=assigned):
            return origin(assigned[name]) if name in assigned else name

        assert {name for name in assigned if origin(name) == value} == set(sample.answers)
        # In the order of the text no variable is read before it is set.
        order = list(assigned)
        assert all(assigned[name] in order[: order.index(name)] or assigned[name].isdecimal() for name in order)


def test_few_shot_labels_stand_for_one_category_each(samples):
    for seed in SEEDS:
        sample = samples["few_shot", seed]
        pairs = re.findall(r'"(.+)" has the label (\w+)\.', sample.prompt)
        assert len({label for _, label in pairs}) == 6
        assert sum(label == sample.answers[0] for _, label in pairs) == len(sample.evidence) == 4
        query = re.findall(r'have\? "(.+)" Answer', sample.prompt)
        assert len(query) == 1
        assert query[0] not in dict(pairs)


def test_documents_tempt_with_another_person_and_another_fact(samples):
    for seed in SEEDS:
        sample = samples["multi_doc_qa", seed]
        documents = re.split(r"^Document \d+: ", sample.prompt, flags=re.MULTILINE)[1:]
        assert len(documents) == min(TOKENS // 350, 12)
        evidence = sample.evidence_texts()[0]
        person = re.search(r"[A-Z][a-z]+ [A-Z][a-z]+", evidence.removeprefix("The best friend of ")).group()
        assert person in sample.prompt[-200:]
        assert sample.prompt.count(person) == 3  # the fact, another fact, the question
        frame = re.escape(evidence).replace(re.escape(person), r"[A-Z]\w+ [A-Z]\w+")
        frame = frame.replace(sample.answers[0], r"[A-Z]\w+")
        assert len(re.findall(frame, sample.prompt)) >= 2


def test_needles_lie_at_every_depth(tokenizer):
    depths = []
    for seed in range(40):
        sample = make("niah_single", seed, 1500, tokenizer)
        depths.append(sample.evidence[0][0] / len(sample.prompt))
    assert min(depths) < 0.15
    assert max(depths) > 0.75
    assert 0.35 < sum(depths) / len(depths) < 0.65


def test_code_needs_a_definition_far_above(samples):
    for seed in SEEDS:
        sample = samples["code_completion", seed]
        code, answer = sample.prompt, sample.answers[0]
        assert sample.metric == "edit_similarity"
        assert answer not in code
        (start, _), (line,) = sample.evidence[0], sample.evidence_texts()
        shared = set(re.findall(r"\w{5,}", line)) & set(re.findall(r"\w{5,}", answer))
        assert shared
        assert start < 0.85 * len(code)


def test_code_completion_is_the_line_that_follows(tmp_path, tokenizer):
    lines = [f"value_{i} = compute_{i}(left_{i}, right_{i})\n" for i in range(200)]
    lines[110] = "    def far_away_helper(self, number):\n"
    lines[180] = "    total = self.far_away_helper(17)\n"
    (tmp_path / "a.py").write_text("".join(lines))
    sample = make("code_completion", 0, 5000, tokenizer, [tmp_path / "a.py"])
    assert sample.answers == ("total = self.far_away_helper(17)",)
    assert sample.evidence_texts() == ("def far_away_helper(self, number):",)
    assert sample.prompt.endswith(
        lines[179].rstrip() + "\n\nWrite the next line of this code. Answer with that line only."
    )


def test_code_without_a_line_that_needs_an_earlier_one_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.py").write_text("call(once)\n" * 2000)
    with pytest.raises(ValueError, match="sources: expected code of more than 3000 tokens"):
        make("code_completion", 0, 3000, tokenizer, [tmp_path / "a.py"])


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_own_files_are_the_text(task, tmp_path, tokenizer):
    files = [tmp_path / f"{i}.txt" for i in range(3)]
    for i, file in enumerate(files):
        file.write_text(" ".join(f"Alpha{i} beta{i} gamma{n}." for n in range(400)))
    sample = make(task, 5, 4000, tokenizer, files)
    assert re.search(r"Alpha\d beta\d gamma\d+\.", sample.prompt)
    assert "Python" not in sample.prompt
    assert make(task, 5, 4000, tokenizer, [str(file) for file in files]) == sample


def test_a_sentence_of_the_text_that_holds_an_answer_is_left_out():
    filler = Filler([Document("a", ("One 123 here. ", "Two there. ", "Three 12 3. "))], avoid=["123"])
    assert filler.words(4) == ["Two there. ", "Three 12 "]


def test_filler_ends_after_the_words_asked_for():
    filler = Filler([Document("a", ("a b c. ", "d e. ")), Document("b", ("f g.\n\n",))])
    assert filler.words(0) == []
    assert filler.words(3) == ["a b c. "]
    assert filler.words(4) == ["a b c. ", "d "]
    assert filler.words(7) == ["a b c. ", "d e. ", "f g.\n\n"]
    with pytest.raises(ValueError, match="sources: expected more text, got 7 words"):
        filler.words(8)


def test_drafts_remember_their_evidence_through_a_paragraph_break():
    draft = Draft("In. ").add("Fact one. ", evidence=True).add("  \n ").break_paragraph().add("Fact 2.", evidence=True)
    assert draft.text == "In. Fact one.\n\nFact 2."
    assert [draft.text[a:b] for a, b in draft.evidence] == ["Fact one.", "Fact 2."]


def test_fit_finds_the_longest_draft(tokenizer):
    draft, count = fit(lambda words: Draft("q" + "ab " * words), 100, tokenizer)
    assert (len(draft.text), count) == (100, 100)
    draft, count = fit(lambda words: Draft("ab " * words), 100, tokenizer)
    assert count == 99


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("niah", 0, 4000), r"task: expected one of \('niah_single'.*got 'niah'"),
        (("niah_single", -1, 4000), "seed: expected an int of at least 0, got -1"),
        (("niah_single", 0, 0), "tokens: expected an int of at least 1, got 0"),
        (("niah_single", 0, 1e3), "tokens: expected an int of at least 1, got 1000.0"),
        (("niah_single", 0, 50), r"tokens: expected at least \d+, .* got 50"),
    ],
)
def test_bad_arguments_are_named(arguments, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        make(*arguments, tokenizer)


def test_bad_sources_are_named(tmp_path, tokenizer):
    short = tmp_path / "short.txt"
    short.write_text("Too short. " * 20)
    with pytest.raises(ValueError, match="sources: expected more text, got 40 words in all"):
        make("niah_single", 0, 4000, tokenizer, [short])
    with pytest.raises(ValueError, match=r"sources: expected text files, got .*missing"):
        make("niah_single", 0, 4000, tokenizer, [tmp_path / "missing"])
    for sources in ([], str(short)):
        with pytest.raises(ValueError, match="sources: expected a list of text files"):
            make("niah_single", 0, 4000, tokenizer, sources)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("tokens", [512, 2048])
def test_lengths_and_evidence_with_a_real_tokenizer(tokens):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models.ensure("smollm2-135m"))
    for task in TASKS:
        sample = make(task, 11, tokens, tokenizer)
        # Examples are not cut: 512 tokens are about twenty of them.
        least = tokens - 40 if task in ("few_shot", "code_completion") else 0.98 * tokens
        assert least <= sample.prompt_tokens == count_tokens(sample.prompt, tokenizer) <= tokens
        ids = tokenizer(sample.prompt, add_special_tokens=False, return_offsets_mapping=True)
        for start, end in sample.evidence:
            held = [i for i, (a, b) in enumerate(ids["offset_mapping"]) if a < end and b > start]
            assert sample.prompt[start:end] in tokenizer.decode([ids["input_ids"][i] for i in held])
