"""Rules over `optimizer`."""

from megatron_vlm.config.rules.base import SectionRules

RULES = SectionRules("optimizer", may_change={"optimizer": False})
