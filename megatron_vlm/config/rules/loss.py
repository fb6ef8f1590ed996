"""Rules over `loss`."""

from megatron_vlm.config.rules.base import SectionRules

RULES = SectionRules("loss", may_change={"loss": False})
