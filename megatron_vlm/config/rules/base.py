"""Parts of a section's rules: checks with the sentence that documents them, and the decisions on a resume.

    RULES = SectionRules("parallel", may_change={"parallel": True})

    @RULES.of_recipe("parallel.sequence", says="`true` needs `parallel.tensor` above 1")
    def _sequence(config: Config) -> Iterator[str]:
        if config.parallel.sequence and config.parallel.tensor == 1:
            yield "parallel.sequence: found true with parallel.tensor 1, needs parallel.tensor > 1 or false"

A check yields a violation, `key: found value, needs values`, for each thing that is wrong. It is pure, so it runs
before any process group or weight exists; what it must know of the model comes as `ModelFacts`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from megatron_vlm.config.schema import Config

Check = TypeVar("Check", bound=Callable[..., Iterator[object]])


@dataclass(frozen=True)
class ModelFacts:
    """Facts of the model and of this installation that the rules need."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int
    vocab_size: int  # rows of the embedding table, unpadded
    vision_num_layers: int  # encoder layers of the whole tower
    tokens_per_image: int
    parameter_names: Mapping[str, tuple[str, ...]]  # global, of language, vision (what is reached) and projector
    families: tuple[str, ...]
    projectors: tuple[str, ...]
    templates: tuple[str, ...]
    tasks: tuple[str, ...]
    installed: frozenset[str]  # as config.packages names them
    context_tokens: int | None = None  # positions that the language model knows, where its config says so
    backend_obstacles: tuple[str, ...] = ()  # why backends named under `ops` cannot run, where the device is known


RecipeCheck = Callable[[Config], Iterator[str]]
RankCheck = Callable[[Config, int], Iterator[str]]  # recipe, number of ranks
ModelCheck = Callable[[Config, ModelFacts], Iterator[str]]
UnusedCheck = Callable[[Config, ModelFacts, int], Iterator[tuple[str, str]]]  # -> keys, reason


@dataclass(frozen=True)
class Rule(Generic[Check]):
    """A check, and what docs/configuration.md says of it.

    Args:
        keys: dotted keys of the recipe at which it is told.
        says: the rule in plain English, as it follows a key's name.
        check: yields what is wrong with a recipe, or what does nothing in it.
    """

    keys: tuple[str, ...]
    says: str
    check: Check


class SectionRules:
    """The rules of one section of the recipe, and which of its keys may change when a run is resumed.

    Args:
        section: its name in the recipe.
        may_change: key or section -> whether a resumed run may have another value; the nearest entry decides. A key
            that cannot change what is learnt may.
        alike: key that may not change -> values of it with which the same is learnt: among them it may.
    """

    def __init__(
        self, section: str, may_change: Mapping[str, bool], alike: Mapping[str, tuple[object, ...]] | None = None
    ) -> None:
        self.section, self.may_change, self.alike = section, dict(may_change), dict(alike or {})
        self.recipe_rules: list[Rule[RecipeCheck]] = []
        self.rank_rules: list[Rule[RankCheck]] = []
        self.model_rules: list[Rule[ModelCheck]] = []
        self.unused_rules: list[Rule[UnusedCheck]] = []

    def of_recipe(self, *keys: str, says: str) -> Callable[[RecipeCheck], RecipeCheck]:
        """Decorator of a check that needs the recipe alone."""
        return _adding(self.recipe_rules, keys, says)

    def of_ranks(self, *keys: str, says: str) -> Callable[[RankCheck], RankCheck]:
        """Decorator of a check that needs the number of ranks too."""
        return _adding(self.rank_rules, keys, says)

    def of_model(self, *keys: str, says: str) -> Callable[[ModelCheck], ModelCheck]:
        """Decorator of a check that needs to know the model."""
        return _adding(self.model_rules, keys, says)

    def unused(self, *keys: str, says: str) -> Callable[[UnusedCheck], UnusedCheck]:
        """Decorator of what tells that a valid recipe sets keys which do nothing in it: (keys, reason)."""
        return _adding(self.unused_rules, keys, says)

    def told_at(self, key: str) -> list[str]:
        """The sentences of the rules over a key, in order."""
        rules: list[Rule[Any]] = [*self.recipe_rules, *self.rank_rules, *self.model_rules, *self.unused_rules]
        return [rule.says for rule in rules if key in rule.keys]


def _adding(rules: list[Rule[Check]], keys: tuple[str, ...], says: str) -> Callable[[Check], Check]:
    def add(check: Check) -> Check:
        rules.append(Rule(keys, says, check))
        return check

    return add


def divisors(number: int) -> str:
    """All divisors of a number, for an error that names the values allowed."""
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
