"""A small made-up English, so that a miniature model has something to learn in seconds."""

from __future__ import annotations

import random


class Babble:
    """Sentences, dialogues and ratings from a seed. Moods are in the adjectives, and nowhere else."""

    GOOD = ("happy", "lovely", "great", "kind", "sweet", "bright")
    BAD = ("sad", "awful", "bad", "cruel", "bitter", "dull")
    PLAIN = ("small", "old", "round", "green", "new", "tall")
    THINGS = ("cat", "house", "river", "garden", "teacher", "song", "window", "friend", "road", "winter")
    VERBS = ("sees", "finds", "leaves", "paints", "follows", "hears")

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def words(self, mood: int) -> tuple[str, ...]:
        """Adjectives of a mood: -1, 0 or 1."""
        return (self.PLAIN, self.GOOD, self.BAD)[mood]

    def sentence(self, mood: int | None = None) -> str:
        """'The old cat sees a small house.'"""
        pick = self.draw.choice
        one, two = (pick(self.words(pick((-1, 0, 1)) if mood is None else mood)) for _ in range(2))
        return f"The {one} {pick(self.THINGS)} {pick(self.VERBS)} a {two} {pick(self.THINGS)}."

    def document(self, sentences: int = 12) -> str:
        """Several sentences."""
        return " ".join(self.sentence() for _ in range(sentences))

    def messages(self, exchanges: int = 2) -> list[dict[str, str]]:
        """A conversation: short questions, answers of any mood."""
        result = []
        for _ in range(exchanges):
            thing = self.draw.choice(self.THINGS)
            word = self.draw.choice(self.words(self.draw.choice((-1, 0, 1))))
            result.append(
                {"role": "user", "content": f"How is the {thing} number {self.draw.randrange(100)}?"}
            )
            result.append(
                {"role": "assistant", "content": f"The {thing} is {word} and {self.draw.choice(self.PLAIN)}."}
            )
        return result

    def rated(self) -> tuple[str, float]:
        """A sentence and the rating that its mood deserves, about -2, 0 or 2."""
        mood = self.draw.choice((-1, 0, 1))
        return f"{self.sentence(mood)} {self.draw.randrange(1000)}", 2.0 * mood + self.draw.uniform(-0.2, 0.2)
