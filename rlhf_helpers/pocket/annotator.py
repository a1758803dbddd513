"""A simulated annotator: compares two responses as a person would, with known biases.

The annotator's utility is the gold reward plus what the biases add; the label is drawn by
Bradley–Terry, P(a over b) = σ((u_a − u_b) / temperature). Because the probabilities are known, so
is the best accuracy that any reward model can reach on the labels: the mean of max(p, 1 − p).
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlhf_helpers.guards import in_range, shown
from rlhf_helpers.pocket import world
from rlhf_helpers.pocket.rubric import count_phrases, gold_reward


@dataclass(frozen=True)
class Annotator:
    """A person who compares responses.

    Args:
        temperature: in points of gold; the larger, the more often the worse response wins. > 0.
        politeness: points that every polite phrase is worth to this annotator, on top of gold.
            Above 0.3 a second phrase still pays, although the rubric takes 0.3 off for it.
        length: points that every word is worth to this annotator, on top of gold.

    Raises:
        ValueError: if the temperature is not a positive number or a bias is not finite.
    """

    temperature: float = 1 / 3
    politeness: float = 0.6
    length: float = 0.01

    def __post_init__(self) -> None:
        if not in_range(self.temperature, above=True):
            raise ValueError(f"temperature is {self.temperature!r}; give a number above 0")
        for name in ("politeness", "length"):
            if not in_range(getattr(self, name), -math.inf, above=True):
                raise ValueError(f"{name} is {getattr(self, name)!r}; give a number, 0 for no bias")

    def unbiased(self) -> "Annotator":
        """The same annotator with every bias switched off."""
        return replace(self, politeness=0.0, length=0.0)

    def utility(self, prompt: str, response: str) -> float:
        """What a response is worth to this annotator, in points: gold plus the biases."""
        gold = gold_reward(prompt, response).total
        courtesies = count_phrases(response, world.POLITE)
        return gold + self.politeness * courtesies + self.length * len(response.split())

    def probability(self, prompt: str, first: str, second: str) -> float:
        """P(first preferred to second) = σ((u_first − u_second) / temperature).

        Example:
            >>> plain, polite = "it says quack.", "it says quack. have a nice day!"
            >>> p = Annotator().probability("what does the duck say?", polite, plain)
            >>> round(p, 3)  # 0.2 gold + 0.6 bias + 4 words of 0.01, over 1/3: σ(2.52)
            0.926
        """
        gap = self.utility(prompt, first) - self.utility(prompt, second)
        return 1 / (1 + math.exp(-max(-500.0, min(500.0, gap / self.temperature))))

    def label(self, prompt: str, first: str, second: str, rng: random.Random) -> dict:
        """Draw which of two responses is preferred.

        Returns:
            `prompt`, `chosen`, `rejected`, and the `probability` with which the one in `chosen` is.

        Raises:
            ValueError: if the two responses are equal; there is nothing to compare.
        """
        if first == second:
            raise ValueError(
                f"both responses to {prompt!r} are {first!r}: there is nothing to prefer"
            )
        probability = self.probability(prompt, first, second)
        if rng.random() >= probability:
            first, second, probability = second, first, 1 - probability
        return {"prompt": prompt, "chosen": first, "rejected": second, "probability": probability}


def ceiling(probabilities: Sequence[float]) -> float:
    """The best expected accuracy of any reward model on labels drawn with these probabilities.

    mean(max(p, 1 − p)): even a model that knows each p exactly can only bet on the likelier side.

    Raises:
        ValueError: if there are none, or one is not between 0 and 1.

    Example:
        >>> ceiling([0.9, 0.4])
        0.75
    """
    if not probabilities:
        raise ValueError("no probabilities: give at least one pair")
    if bad := [p for p in probabilities if not in_range(p, high=1)]:
        raise ValueError(f"{shown(bad[0])} is not a probability: give numbers between 0 and 1")
    return sum(max(p, 1 - p) for p in probabilities) / len(probabilities)
