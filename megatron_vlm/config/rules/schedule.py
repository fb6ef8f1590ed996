"""Rules over `schedule`."""

from megatron_vlm.config.rules.base import SectionRules

RULES = SectionRules("schedule", may_change={"schedule": False})
