"""A task that a language model of 135 million parameters learns in minutes, and that needs no judge: sentence -> JSON record.

    "Clara orders three grey tickets for Vienna."
    {"name": "Clara", "item": "ticket", "color": "grey", "count": 3, "city": "Vienna"}

The sentences are drawn with a seed; no sentence to be judged on is one to train on. An answer is right if it is the record to
the character: the keys and their order, the number as a number, the item in the singular.
"""

from __future__ import annotations

import json
import random

INSTRUCTION = "Write the order as JSON."

VALUES = {
    "name": "Anna Ben Clara David Emma Felix Grace Henry Iris Jack Karin Leo Mia Nora Oscar Paul Rosa Sam Tina Victor",
    "item": "basket blanket book bottle bucket candle carpet chair clock guitar jacket kettle ladder lamp mirror pillow table",
    "color": "black blue brown green grey red white yellow",
    "count": "two three four five six seven eight nine ten eleven twelve",
    "city": "Athens Berlin Boston Cairo Chicago Denver Dublin Lisbon London Madrid Oslo Paris Prague Rome Tokyo Vienna",
}
SENTENCES = (
    "{name} orders {count} {color} {item}s for {city}.",
    "{name} from {city} needs {count} {color} {item}s.",
    "Please send {count} {color} {item}s to {name} in {city}.",
    "To {city}: {count} {color} {item}s for {name}.",
    "In {city}, {name} buys {count} {color} {item}s.",
    "{count} {color} {item}s go to {name} in {city}.",
)


def orders(size: int, seed: int = 0) -> list[tuple[str, str]]:
    """`size` different sentences, each with its record as JSON."""
    generator, found = random.Random(seed), {}
    values = {key: words.split() for key, words in VALUES.items()}
    while len(found) < size:
        words = {key: generator.choice(choices) for key, choices in values.items()}
        record = words | {"count": values["count"].index(words["count"]) + 2}
        shown = words | {"count": generator.choice((words["count"], str(record["count"])))}
        sentence = generator.choice(SENTENCES).format_map(shown)
        found[sentence[0].upper() + sentence[1:]] = json.dumps(record)
    return list(found.items())
