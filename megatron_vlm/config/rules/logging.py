"""Rules over `logging`."""

from megatron_vlm.config.rules.base import SectionRules

RULES = SectionRules("logging", may_change={"logging": True})
