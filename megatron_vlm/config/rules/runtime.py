"""Rules over `runtime`."""

from megatron_vlm.config.rules.base import SectionRules

RULES = SectionRules(
    "runtime", may_change={"runtime.device": True, "runtime.seed": False, "runtime.timeout_seconds": True}
)
