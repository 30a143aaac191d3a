"""Reading tasks: labels that only examples explain, and a question about one of several documents."""

from __future__ import annotations

import random
from itertools import islice
from typing import Any

from specprefill_kernels.quality.tasks.haystack import Filler, Sources, documents
from specprefill_kernels.quality.tasks.sample import Draft, Sample, different, draw, fit, words

_CATEGORIES = {
    "animal": "badger beaver camel cheetah dolphin donkey falcon giraffe hamster hedgehog leopard lizard otter panther "
    "penguin rabbit raccoon squirrel turtle walrus zebra",
    "food": "bagel burrito cheesecake croissant dumpling lasagna muffin noodle omelette pancake pizza porridge pretzel "
    "pudding risotto salad sandwich sausage soup taco waffle",
    "instrument": "accordion banjo bassoon cello clarinet cymbal drum fiddle flute guitar harmonica harp mandolin oboe "
    "piano saxophone trombone trumpet tuba ukulele violin",
    "vehicle": "ambulance bicycle bulldozer canoe caravan ferry helicopter kayak limousine lorry motorcycle rickshaw "
    "rowboat sailboat scooter sled submarine tractor tram truck yacht",
    "garment": "apron beret blouse bonnet cardigan coat dress glove hoodie jacket kimono mitten pyjama robe sandal "
    "scarf shirt skirt sock sweater trousers",
    "tool": "axe chisel crowbar drill hammer hatchet hoe ladder mallet pickaxe pincer pliers rake saw screwdriver "
    "shovel sickle spade tape trowel wrench",
}
_SCENES = (
    "Yesterday my neighbour talked about the {} for an hour.",
    "Nobody had expected to see the {} at the party.",
    "The picture on the wall shows the {}.",
    "She wrote a long letter about her {}.",
    "They found the {} right in the middle of the street.",
    "He paid too much for the {}.",
    "My cousin dreamt of the {} last night.",
    "The children drew the {} with chalk.",
)

_GIVEN = words("Adela Bruno Carla Dario Elsa Felix Greta Hugo Irina Jonas Katja Lorenz Mila Nils Olga Pavel Runa Silas")
_FAMILY = words("Abendroth Brisk Calloway Dahlgren Easton Ferrante Grimaldi Holm Ivers Jarnik Kessler Lindqvist Moreau")
_SYLLABLES = words("ba bel cor dan dor fen gal hol kar lan mer nor pel qua rin sol tam ul var wen yor zim")
# What a document says, and the question, in other words.
_FACTS = (
    ("{} grew up in the town of {}.", "In which town did {} spend childhood?"),
    ("The company that {} works for is called {}.", "Who is the employer of {}?"),
    ("{} owns a boat by the name of {}.", "What is the boat of {} called?"),
    ("The best friend of {} is named {}.", "Who is the closest friend of {}?"),
    ("{} spends every holiday on the island of {}.", "To which island does {} go on holiday?"),
)


def few_shot(seed: int, tokens: int, tokenizer: Any, sources: Sources | None = None) -> Sample:
    """Sentences with labels that stand for what the sentence is about; evidence are the examples with the right label.

    `sources` are not read: the examples are the whole text.
    """
    rng = draw("few_shot", seed, tokens)
    labels = dict(zip(_CATEGORIES, different(lambda: _name(rng, 2), len(_CATEGORIES))))
    asked = rng.choice(sorted(_CATEGORIES))
    nouns = {category: list(words(text)) for category, text in _CATEGORIES.items()}
    query = rng.choice(nouns[asked])
    nouns[asked].remove(query)
    # The right label comes a few times, whatever the length; the others fill the rest, evenly.
    right = 4
    shown = rng.sample(nouns[asked], right)
    depths = sorted(rng.random() for _ in shown)
    others = [category for category in sorted(_CATEGORIES) if category != asked]
    scenes = [(category, word) for category in others for word in nouns[category]]
    rng.shuffle(scenes)
    places = [rng.randrange(len(_SCENES)) for _ in range(1024)]

    def example(word: str, number: int, label: str) -> str:
        return f'"{sentence(word, number)}" has the label {label}.\n'

    def sentence(word: str, number: int) -> str:
        return _SCENES[places[number % len(places)]].format(word)

    def build(count: int) -> Draft:
        draft = Draft("Each sentence has a label, which depends on the thing in it.\n\n")
        at = [int(depth * (count + 1)) for depth in depths]
        for index in range(count + 1):
            for number, (place, word) in enumerate(zip(at, shown)):
                if place == index:
                    draft.add(example(word, -number - 1, labels[asked]), evidence=True)
            if index < count:
                category, word = scenes[index % len(scenes)]
                draft.add(example(word, index, labels[category]))
        question = (
            f'\nQuestion: Which label does this sentence have? "{sentence(query, 500)}" Answer with the label only.'
        )
        return draft.add(question)

    draft, count = fit(build, tokens, tokenizer)
    return _finished("few_shot", seed, draft, [labels[asked]], 16, tokens, count)


def multi_doc_qa(seed: int, tokens: int, tokenizer: Any, sources: Sources | None = None) -> Sample:
    """Several documents with one fact inserted in each; the question is about one, in other words than the fact's.

    Another document says the same of another person, and another says something else of the same person.
    """
    rng = draw("multi_doc_qa", seed, tokens)
    count = min(max(tokens // 350, 3), 12)
    people = different(lambda: f"{rng.choice(_GIVEN)} {rng.choice(_FAMILY)}", count)
    values = different(lambda: _name(rng, 3), count)
    asked = rng.randrange(count)
    kind = rng.randrange(len(_FACTS))
    others = [place for place in range(count) if place != asked]
    rng.shuffle(others)
    facts = [_FACTS[rng.randrange(len(_FACTS))][0].format(people[i], values[i]) for i in range(count)]
    facts[asked] = _FACTS[kind][0].format(people[asked], values[asked])
    facts[others[0]] = _FACTS[kind][0].format(people[others[0]], values[others[0]])
    facts[others[1]] = _FACTS[(kind + 1) % len(_FACTS)][0].format(people[asked], values[others[1]])
    depths = [rng.random() for _ in range(count)]
    texts = _parted(rng, count, 60 + tokens // 200, sources, values)

    def build(amount: int) -> Draft:
        draft = Draft("Read the documents and answer the question that follows them.\n\n")
        for index, (title, filler) in enumerate(texts):
            draft.add(f"Document {index + 1}: {title}\n\n")
            share = (index + 1) * amount // count - index * amount // count
            sentences = filler.words(share)
            place = int(depths[index] * (len(sentences) + 1))
            for sentence in sentences[:place]:
                draft.add(sentence)
            draft.add(facts[index] + " ", evidence=index == asked)
            for sentence in sentences[place:]:
                draft.add(sentence)
            draft.break_paragraph()
        question = _FACTS[kind][1].format(people[asked])
        return draft.add(f"Question: {question} Answer with the name only.")

    draft, length = fit(build, tokens, tokenizer)
    return _finished("multi_doc_qa", seed, draft, [values[asked]], 16, tokens, length)


def _parted(
    rng: random.Random, count: int, most: int, sources: Sources | None, avoid: list[str]
) -> list[tuple[str, Filler]]:
    """`count` streams of text, of `most` documents, that share none while there are enough of them."""
    found = list(islice(documents(rng, sources), most))
    streams = []
    for index in range(count):
        own = found[index % len(found) :: count] if len(found) >= count else found[index % len(found) :]
        streams.append((own[0].title, Filler(own, avoid)))
    return streams


def _finished(
    task: str, seed: int, draft: Draft, answers: list[str], max_new_tokens: int, tokens: int, count: int
) -> Sample:
    return Sample(
        task=task,
        seed=seed,
        prompt=draft.text,
        answers=tuple(answers),
        evidence=tuple(draft.evidence),
        metric="contains_all",
        max_new_tokens=max_new_tokens,
        context_tokens=tokens,
        prompt_tokens=count,
    )


def _name(rng: random.Random, syllables: int) -> str:
    return "".join(rng.choice(_SYLLABLES) for _ in range(syllables)).capitalize()
