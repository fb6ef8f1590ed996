"""`loss`: how the training loss departs from the plain cross entropy per token."""

from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from megatron_vlm.config.schema.base import NonNegativeFloat, PositiveFloat, PositiveInt, Section, Share

TIME_TOKEN_NUMBER = "{t}"


def _numbered(value: str) -> str:
    if TIME_TOKEN_NUMBER not in value:
        raise PydanticCustomError(
            "no_number", "must have {t} where the token's number stands", {"t": TIME_TOKEN_NUMBER}
        )
    return value


class TimeTokensConfig(Section):
    """Tokens that stand for moments, which the tokenizer has with consecutive ids: a label among them is trained as a
    normal distribution over all of them (LITA, VILA)."""

    format: Annotated[str, AfterValidator(_numbered)] = Field(
        default="<t{t}>", description="Name of a time token, with {t} for its number, 0 to count - 1."
    )
    count: PositiveInt = Field(description="Number of time tokens.")
    std: PositiveFloat = Field(default=1.0, description="Standard deviation of the distribution, in tokens.")

    def names(self) -> tuple[str, ...]:
        """All tokens' names, in order."""
        return tuple(self.format.replace(TIME_TOKEN_NUMBER, str(t)) for t in range(self.count))


class LossConfig(Section):
    """The training loss, which is also the one that is logged, and how it departs from cross entropy per token.
    Held-out losses and scores are always the plain one."""

    z_loss: NonNegativeFloat = Field(
        default=0.0, description="Factor of logsumexp(logits)^2, which is added to each token's loss; PaLM has 1e-4."
    )
    label_smoothing: Share = Field(
        default=0.0, description="Share of the target that is spread evenly over the vocabulary."
    )
    time_tokens: TimeTokensConfig | None = Field(
        default=None,
        description="Tokens that stand for moments of a video; a label among them is trained as a normal distribution "
        "over all of them (LITA, VILA). null: none.",
    )
