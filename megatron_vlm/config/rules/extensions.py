"""Rules over `extensions`: what they bring is named by other keys, which are judged where they are."""

from megatron_vlm.config.rules.base import SectionRules

RULES = SectionRules("extensions", may_change={"extensions": True})
