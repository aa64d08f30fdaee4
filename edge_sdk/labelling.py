"""Labelling functions: what somebody knows about the samples, as code that labels some of them.

Each function gives a label or abstains (None); a weighted vote makes one label of what they say.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

_SMOOTHING = 2.0
"""Votes at chance that each function starts with before it is judged."""


@dataclass(frozen=True)
class LabellingFunction:
    """One rule.

    Attributes:
        name: What it is called in votes and failures.
        function: A sample as the app has it to a label, or None to abstain.
        weight: How much its vote counts, > 0.
    """

    name: str
    function: Callable[[Any], str | None]
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Check name and weight.

        Raises:
            ValueError: The name is empty, or the weight is not finite or not positive.
        """
        if not self.name:
            raise ValueError("a labelling function needs a name")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"the weight of {self.name} must be finite and above 0, got {self.weight}")


@dataclass(frozen=True)
class Vote:
    """What the functions say about one sample.

    Attributes:
        label: The one with most weight.
        confidence: Its share of the weight that voted, in (0, 1].
        votes: Label by name of each function that did not abstain.
    """

    label: str
    confidence: float
    votes: dict[str, str]


class LabellingFunctions:
    """Labelling functions and their weighted vote.

    A function that raises, or gives anything but a label or None, counts as abstaining; that is counted in
    `failures`, and logged the first time.

    Args:
        functions: With unique names.
        min_share: A label with less than this share of the weight that voted is none, 0 to 1.

    Raises:
        ValueError: Two functions have the same name, or `min_share` is not a share.

    Source:
        Ratner et al. 2017, "Snorkel: Rapid training data creation with weak supervision",
        doi:10.14778/3157794.3157797; a vote in place of its generative model.

    Example:
        >>> rules = LabellingFunctions([
        ...     LabellingFunction("loud", lambda x: "alarm" if max(x) > 0.9 else None),
        ...     LabellingFunction("silent", lambda x: "quiet" if max(x) < 0.1 else None),
        ... ])
        >>> rules.vote([0.2, 0.95]).label
        'alarm'
        >>> rules.vote([0.5]) is None
        True
    """

    def __init__(self, functions: Iterable[LabellingFunction], *, min_share: float = 0.5) -> None:
        self.functions = tuple(functions)
        self.min_share = min_share
        self.failures: Counter[str] = Counter()
        """How often each function failed, by name."""
        repeated = [name for name, count in Counter(rule.name for rule in self.functions).items() if count > 1]
        if repeated:
            raise ValueError(f"two labelling functions are called {repeated[0]!r}; give each its own name")
        if not 0 <= min_share <= 1:
            raise ValueError(f"min_share is a share from 0 to 1, got {min_share}")

    def vote(self, x: Any) -> Vote | None:
        """The label of a sample; None if all abstain, if the first two labels tie, or if none has its share."""
        votes: dict[str, str] = {}
        weights: dict[str, float] = {}
        for rule in self.functions:
            if (label := self._ask(rule, x)) is not None:
                votes[rule.name] = label
                weights[label] = weights.get(label, 0.0) + rule.weight
        if not votes:
            return None
        first, second = sorted([*weights.values(), 0.0], reverse=True)[:2]
        share = first / sum(weights.values())
        if math.isclose(first, second) or share < self.min_share:
            return None
        return Vote(max(weights, key=weights.__getitem__), share, votes)

    def weighted(self, samples: Sequence[Any], truths: Sequence[str]) -> LabellingFunctions:
        """The same functions, weighted by how often each was right where it did not abstain.

        With C labels and a function's accuracy a (smoothed by two votes at chance) its weight is
        log(a / (1 - a)) + log(C - 1): what its vote adds to the label's log-odds if functions err independently and
        evenly. One no better than chance, or that never voted, is left out.

        Args:
            samples: As given to `vote`.
            truths: The known label of each.

        Raises:
            ValueError: There are not as many truths as samples, or fewer than two labels among them.

        Source:
            Nitzan & Paroush 1982, "Optimal decision rules in uncertain dichotomous choice situations",
            doi:10.2307/2526438; for C labels this is naive Bayes with one accuracy for each function.
        """
        labels = len(set(truths))
        if len(samples) != len(truths) or labels < 2:
            raise ValueError(
                f"weights need one truth for each sample and two labels or more, got {len(samples)} samples, "
                f"{len(truths)} truths and {labels} labels"
            )
        rules = []
        for rule in self.functions:
            answers = [self._ask(rule, x) for x in samples]
            voted = sum(answer is not None for answer in answers)
            right = sum(answer == truth for answer, truth in zip(answers, truths, strict=True))
            accuracy = (right + _SMOOTHING / labels) / (voted + _SMOOTHING)
            weight = math.log(accuracy / (1 - accuracy)) + math.log(labels - 1)
            if weight > 1e-9:
                rules.append(LabellingFunction(rule.name, rule.function, weight))
        return LabellingFunctions(rules, min_share=self.min_share)

    def _ask(self, rule: LabellingFunction, x: Any) -> str | None:
        try:
            label = rule.function(x)
        except Exception as error:  # noqa: BLE001 - code of the app; whatever it raises, serving goes on
            self._failed(rule, f"raised {type(error).__name__}")  # its message might hold the sample
            return None
        if label is not None and not (isinstance(label, str) and label):
            self._failed(rule, f"gave a {type(label).__name__} that is no label")
            return None
        return label

    def _failed(self, rule: LabellingFunction, what: str) -> None:
        if rule.name not in self.failures:
            logger.warning(
                "labelling function %s %s; it abstains, and further failures are only counted", rule.name, what
            )
        self.failures[rule.name] += 1
