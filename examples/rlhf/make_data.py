#!/usr/bin/env python3
"""Writes data/prefs.jsonl and data/eval.jsonl: questions, each with a good answer (`chosen`), a bad one (`rejected`),
and one as somebody may have given it (`demo`): one of three of these is good.

Everything is made from the tables below with a fixed seed, so the files are the same wherever this runs. Good answers
are right, and say so when a thing cannot be known; bad ones are evasive, rude or wrong, and as long as good ones. So
a model that learns from demonstrations answers either way, and a reward that looks at length or at single words of
the question would not tell them apart. Standard library only.
"""

import json
import pathlib
import random

rng = random.Random(7)

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon", "Germany": "Berlin", "Austria": "Vienna",
    "Poland": "Warsaw", "Hungary": "Budapest", "Greece": "Athens", "Ireland": "Dublin", "Norway": "Oslo",
    "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen", "Japan": "Tokyo", "China": "Beijing",
    "India": "New Delhi", "Egypt": "Cairo", "Kenya": "Nairobi", "Ghana": "Accra", "Peru": "Lima", "Chile": "Santiago",
    "Cuba": "Havana", "Canada": "Ottawa", "Mexico": "Mexico City", "Turkey": "Ankara", "Iran": "Tehran",
    "Thailand": "Bangkok", "Vietnam": "Hanoi", "Nepal": "Kathmandu",
}
LEGS = {"dog": 4, "cat": 4, "spider": 8, "ant": 6, "hen": 2, "horse": 4, "bee": 6, "snake": 0, "crab": 10, "owl": 2}
SOUNDS = {"dog": "barks", "cat": "meows", "cow": "moos", "duck": "quacks", "lion": "roars", "frog": "croaks", "bee": "buzzes"}
YOUNG = {"dog": "puppy", "cat": "kitten", "cow": "calf", "horse": "foal", "sheep": "lamb", "goose": "gosling", "bear": "cub"}
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "light": "dark", "early": "late", "full": "empty", "hard": "soft",
    "high": "low", "old": "young", "rich": "poor", "strong": "weak", "wet": "dry", "loud": "quiet", "near": "far",
}
COLOURS = {"grass": "green", "snow": "white", "coal": "black", "a ripe lemon": "yellow", "the clear sky": "blue", "blood": "red"}
UNITS = {
    "minutes in an hour": 60, "hours in a day": 24, "days in a week": 7, "months in a year": 12, "grams in a kilogram": 1000,
    "metres in a kilometre": 1000, "seconds in a minute": 60, "weeks in a year": 52, "centimetres in a metre": 100,
}
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"]
WORDS = ["apple", "river", "stone", "green", "house", "light", "bread", "chair", "cloud", "music", "plant", "train", "water", "world"]
UNKNOWABLE = [
    "what I had for breakfast", "which card I am holding", "what the weather will be in ten years", "who is at my door",
    "what I am thinking of", "which number will win tomorrow", "where I left my keys", "how my neighbour feels",
]
BAD = [
    "That is a silly question.", "Who cares about {}?", "Find out about {} yourself.", "I do not feel like it today.",
    "Because I say so.", "Ask somebody else.", "Everybody knows about {}.", "Why do you bother me with {}?",
    "I will not talk about {}.", "Maybe, maybe not.", "Go away and read a book about {}.", "You would not understand {}.",
]


def other(values, right):
    return rng.choice([v for v in values if v != right])


def row(prompt, chosen, wrong):
    # Three of four bad answers are bad in their manner, the others in what they say.
    about = prompt.rstrip("?.").split()[-1]
    rejected = wrong if rng.random() < 0.25 else rng.choice(BAD).format(about)
    demo = chosen if rng.random() < 1 / 3 else rng.choice(BAD).format(about)
    return {"prompt": f"Question: {prompt}\nAnswer:", "chosen": chosen, "rejected": rejected, "demo": demo}


def rows():
    for country, city in CAPITALS.items():
        wrong = other(list(CAPITALS.values()), city)
        yield row(f"What is the capital of {country}?", f"The capital of {country} is {city}.", f"The capital of {country} is {wrong}.")
        yield row(f"In which country is {city}?", f"{city} is in {country}.", f"{city} is in {other(list(CAPITALS), country)}.")
        yield row(f"Is {wrong} the capital of {country}?", f"No, the capital of {country} is {city}.", f"Yes, it is {wrong}.")
    for a in range(1, 21):
        for b in range(1, 21):
            if rng.random() < 0.75:
                yield row(f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}.", f"{a} plus {b} is {a + b + rng.choice([-2, -1, 1, 2, 10])}.")
    for a in range(1, 11):
        for b in range(1, 11):
            yield row(f"What is {a} times {b}?", f"{a} times {b} is {a * b}.", f"{a} times {b} is {a * b + rng.choice([-3, -1, 1, 4])}.")
    for a in range(2, 21):
        for b in range(1, a):
            if rng.random() < 0.6:
                yield row(f"What is {a} minus {b}?", f"{a} minus {b} is {a - b}.", f"{a} minus {b} is {a - b + rng.choice([-1, 1, 3])}.")
    for a in range(1, 31):
        b = rng.choice([n for n in range(1, 31) if n != a])
        yield row(f"Which is larger, {a} or {b}?", f"{max(a, b)} is larger than {min(a, b)}.", f"{min(a, b)} is larger than {max(a, b)}.")
        even = "even" if a % 2 == 0 else "odd"
        yield row(f"Is {a} even or odd?", f"{a} is {even}.", f"{a} is {'odd' if even == 'even' else 'even'}.")
    for animal, legs in LEGS.items():
        yield row(f"How many legs does a {animal} have?".replace("a ant", "an ant").replace("a owl", "an owl"), f"It has {legs} legs.", f"It has {other([0, 2, 4, 6, 8, 10], legs)} legs.")
    for animal, sound in SOUNDS.items():
        yield row(f"Which sound does a {animal} make?", f"A {animal} {sound}.", f"A {animal} {other(list(SOUNDS.values()), sound)}.")
    for animal, young in YOUNG.items():
        yield row(f"What is a young {animal} called?", f"A young {animal} is called a {young}.", f"A young {animal} is called a {other(list(YOUNG.values()), young)}.")
    for word, opposite in [*OPPOSITES.items(), *((b, a) for a, b in OPPOSITES.items())]:
        yield row(f"What is the opposite of {word}?", f"The opposite of {word} is {opposite}.", f"The opposite of {word} is {word}.")
    for thing, colour in COLOURS.items():
        yield row(f"Which colour has {thing}?", f"It is {colour}.", f"It is {other(list(COLOURS.values()), colour)}.")
    for what, count in UNITS.items():
        yield row(f"How many {what} are there?", f"There are {count} {what}.", f"There are {other(list(UNITS.values()), count)} {what}.")
    for names, unit in ((DAYS, "day"), (MONTHS, "month")):
        for i, name in enumerate(names):
            after, before = names[(i + 1) % len(names)], names[i - 1]
            yield row(f"Which {unit} comes after {name}?", f"{after} comes after {name}.", f"{before} comes after {name}.")
            yield row(f"Which {unit} comes before {name}?", f"{before} comes before {name}.", f"{after} comes before {name}.")
    for word in WORDS:
        # The other end of the word, or the next letter from there that is wrong.
        not_first = next(letter for letter in reversed(word) if letter != word[0])
        not_last = next(letter for letter in word if letter != word[-1])
        yield row(f"How many letters has the word {word}?", f"The word {word} has {len(word)} letters.", f"The word {word} has {len(word) + 2} letters.")
        yield row(f"What is the first letter of {word}?", f"The first letter of {word} is {word[0]}.", f"The first letter of {word} is {not_first}.")
        yield row(f"What is the last letter of {word}?", f"The last letter of {word} is {word[-1]}.", f"The last letter of {word} is {not_last}.")
    for thing in UNKNOWABLE:
        for start in ("Do you know", "Can you tell me", "Please say"):
            yield row(f"{start} {thing}{'.' if start == 'Please say' else '?'}", f"No, I cannot know {thing}.", f"Yes, I know exactly {thing}.")


def main():
    all_rows = list(rows())
    rng.shuffle(all_rows)
    folder = pathlib.Path(__file__).parent / "data"
    folder.mkdir(exist_ok=True)
    held = len(all_rows) // 8
    for name, part in (("prefs", all_rows[held:]), ("eval", all_rows[:held])):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            for item in part:
                file.write(json.dumps(item, ensure_ascii=False) + "\n")
        words = {key: sum(len(item[key].split()) for item in part) / len(part) for key in ("chosen", "rejected")}
        print(f"{name}: {len(part)} rows, words {words}")


if __name__ == "__main__":
    main()
